"""Samplers: pure functions over a sigma ladder that ends in 0. They hold no weights and draw no noise of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvtitan.models.base import Conditioning, ModelBase

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""`(x [B, T, C, H, W], sigma [B, T]) -> velocity [B, T, C, H, W]`"""


@dataclass(frozen=True)
class SamplerSpec:
    """How a model must be sampled: what `method.sampler()` returns; validation, generation and export all read it."""

    sigmas: tuple[float, ...]
    """The ladder, from 1 down to 0."""
    guidance_scale: float = 1.0
    """`u + g (c - u)`; 1 = no unconditional pass."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the standard form `u + g (c - u)` (arXiv:2207.12598 with g = w + 1), float32.

    The other convention `c + g' (c - u)` is g = g' + 1.
    """
    wide = torch.promote_types(conditional.dtype, torch.float32)
    conditional, unconditional = conditional.to(wide), unconditional.to(wide)
    return unconditional + scale * (conditional - unconditional)


def euler(velocity_fn: VelocityFn, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate dx/dsigma = v from `sigmas[0]` to `sigmas[-1]` by Euler steps `x' = x + (sigma' - sigma) v`.

    x `[B, T, C, H, W]` is pure noise when `sigmas[0] == 1`.
    """
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        level = torch.full(x.shape[:2], sigma, dtype=torch.float32, device=x.device)
        x = x + (next_sigma - sigma) * velocity_fn(x, level).to(x.dtype)
    return x


def sample(
    model: ModelBase, spec: SamplerSpec, noise: Tensor, cond: Conditioning, uncond: Conditioning | None
) -> Tensor:
    """Latents `[B, T, C, H, W]` from `noise`, as `spec` says. `uncond` is needed unless `spec.guidance_scale == 1`."""

    def velocity_fn(x: Tensor, sigma: Tensor) -> Tensor:
        conditional = model.predict_velocity(x, sigma, cond)
        if spec.guidance_scale == 1:
            return conditional
        return guide(conditional, model.predict_velocity(x, sigma, uncond), spec.guidance_scale)

    return euler(velocity_fn, noise, spec.sigmas)
