"""Everything about sigma: the shift, the noising path, velocity -> x0, how sigma is drawn, loss weights, ladders.

Notation (Flow Matching, arXiv:2210.02747; SD3, arXiv:2403.03206): `x = (1 - sigma) x0 + sigma eps`, `v = eps - x0`,
`x0 = x - sigma v`. `sigma` is float32 in [0, 1], one value per latent frame `[B, T]`; latents are `[B, T, C, H, W]`.
A timestep, as written in recipes and fed to the network, is `1000 sigma`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fvtitan.errors import UserError

NUM_TIMESTEPS = 1000


@dataclass
class ScheduleConfig:
    """[schedule]: the noise schedule. Training, validation and score sampling all read this one object."""

    shift: float = 3.0
    """Timestep shift s: sigma = s u / (1 + (s - 1) u). Wan uses 3 at 480p and 5 at 720p."""
    sigma_sampling: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """How u is drawn in training, before the shift."""
    logit_mean: float = 0.0
    """Mean of the logit-normal distribution (sigma_sampling = "logit_normal")."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal distribution (sigma_sampling = "logit_normal")."""
    mode_scale: float = 1.29
    """Scale of SD3's mode sampling (sigma_sampling = "mode")."""

    def check(self) -> None:
        if self.shift <= 0:
            raise UserError(f"schedule.shift = {self.shift}: must be > 0 (1 = no shift, Wan 480p: 3, 720p: 5)")
        if self.logit_std <= 0:
            raise UserError(f"schedule.logit_std = {self.logit_std}: must be > 0")
        # SD3 appendix: the mode density is monotone in u only for these scales.
        if not -1.0 <= self.mode_scale <= 2.0 / (math.pi - 2.0):
            raise UserError(f"schedule.mode_scale = {self.mode_scale}: must be in [-1, 1.75]")
        defaults = ScheduleConfig()
        used = {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}.get(self.sigma_sampling, ())
        for key in ("logit_mean", "logit_std", "mode_scale"):
            if key not in used and getattr(self, key) != getattr(defaults, key):
                raise UserError(
                    f"schedule.{key} = {getattr(self, key)} has no effect with sigma_sampling = {self.sigma_sampling!r}"
                )


def _per_element(sigma: Tensor, x: Tensor) -> Tensor:
    """`[B, T]` -> `[B, T, 1, 1, 1]`, at least float32."""
    return sigma.reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))


def _wide(x: Tensor) -> Tensor:
    """At least float32 (float64 stays float64): losses and sigma arithmetic never run in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shift_sigma(u: Tensor | float, shift: float) -> Tensor | float:
    """`s u / (1 + (s - 1) u)` (SD3 eq. 23), closed form; maps [0, 1] onto itself."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma eps` in at least float32. x0, noise `[B, T, C, H, W]`, sigma `[B, T]`."""
    s = _per_element(sigma, x0)
    return (1 - s) * _wide(x0) + s * _wide(noise)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The regression target `eps - x0`."""
    return _wide(noise) - _wide(x0)


def velocity_to_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """`x - sigma v`."""
    return _wide(x) - _per_element(sigma, x) * _wide(v)


def sample_sigma(uniform: Tensor, schedule: ScheduleConfig) -> Tensor:
    """Map uniform draws on [0, 1) to training sigmas: the density of `schedule.sigma_sampling`, then the shift.

    uniform (SD3's "rf"), logit-normal (SD3 eq. 19) or mode (SD3 eq. 20). Any shape, float32.
    """
    if schedule.sigma_sampling == "logit_normal":
        # The inverse CDF keeps one uniform per draw; clamping keeps the quantile finite at u = 0.
        quantile = math.sqrt(2.0) * torch.erfinv(2.0 * uniform.clamp(1e-7, 1 - 1e-7) - 1.0)
        u = torch.sigmoid(schedule.logit_mean + schedule.logit_std * quantile)
    elif schedule.sigma_sampling == "mode":
        u = 1 - uniform - schedule.mode_scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)
    else:
        u = uniform
    return shift_sigma(u, schedule.shift)


@functools.cache
def _bell_constants(shift: float) -> tuple[float, float]:
    """Minimum of the bell over the 1000 levels of the shifted grid, and its mean above that minimum."""
    sigmas = [shift_sigma(i / NUM_TIMESTEPS, shift) for i in range(1, NUM_TIMESTEPS + 1)]
    bell = [math.exp(-2 * (sigma - 0.5) ** 2) for sigma in sigmas]
    return min(bell), math.fsum(y - min(bell) for y in bell) / len(bell)


def loss_weight(sigma: Tensor, kind: Literal["none", "bell"], shift: float) -> Tensor:
    """Loss weight as a function of the noise level itself, never of an index into a table. Same shape as sigma.

    `bell`: `exp(-2 ((t - 500) / 1000)^2)` with `t = 1000 sigma`, minus its minimum, scaled to mean 1 over the 1000-step
    shifted grid that training draws from (CausVid's causal training).
    """
    if kind == "none":
        return torch.ones_like(sigma)
    lowest, mean = _bell_constants(shift)
    return ((torch.exp(-2 * (sigma - 0.5) ** 2) - lowest) / mean).clamp_min(0.0)


def few_step_ladder(timesteps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Sigmas of a few-step student, from its timesteps (0 - 1000, before the shift) down to 0."""
    return (*[float(shift_sigma(timestep / NUM_TIMESTEPS, shift)) for timestep in timesteps], 0.0)


def euler_ladder(num_steps: int, shift: float) -> list[float]:
    """`num_steps + 1` sigmas from 1 to 0: the shifted uniform grid. The ladder WanPipeline's scheduler has for
    `sigmas = linspace(1, 1/N, N)`."""
    if num_steps < 1:
        raise UserError(f"a sampling ladder needs at least 1 step, got {num_steps}")
    return [float(shift_sigma(1 - i / num_steps, shift)) for i in range(num_steps)] + [0.0]
