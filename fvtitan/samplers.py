"""Samplers: pure functions over a sigma ladder that ends in 0. They hold no weights and draw no noise of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fvtitan.models.base import CausalModelBase, Conditioning, ModelBase
from fvtitan.models.blocks import block_starts

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""`(x [B, T, C, H, W], sigma [B, T]) -> velocity [B, T, C, H, W]`"""

FreshNoise = Callable[[int], Tensor]
"""`rung -> noise [B, T, C, H, W]` of the whole video, for re-noising to that rung of the ladder; the last rung's is for the
context."""

Solver = Callable[[VelocityFn, Tensor, FreshNoise | None], Tensor]
"""`(velocity, noise, fresh noise) -> clean latents`"""


@dataclass(frozen=True)
class SamplerSpec:
    """How a model must be sampled: what `method.sampler(cfg)` returns; validation, generation and export all read it."""

    sigmas: tuple[float, ...]
    """The ladder, from 1 down to 0."""
    guidance_scale: float = 1.0
    """`u + g (c - u)`; 1 = no unconditional pass."""
    solver: Literal["ode", "sde"] = "ode"
    """ode: Euler steps, which re-noise with the implied noise; sde: each step predicts x0 and re-noises with fresh noise."""
    streaming: bool = False
    """Block by block over a KV cache (a causal model), instead of the whole video at once."""
    context_noise: float = 0.0
    """Sigma to which a finished block is noised when it enters the cache."""


def num_forwards(spec: SamplerSpec, num_blocks: int = 1) -> int:
    """Forwards of the network for one video of `num_blocks` blocks; conditional and unconditional count as two."""
    passes = len(spec.sigmas) - 1
    if spec.streaming:
        passes = num_blocks * (passes + 1) - 1  # the last block need not be committed
    return passes * (1 if spec.guidance_scale == 1 else 2)


def describe(spec: SamplerSpec) -> str:
    """`Euler, guidance 3`, `streamed Euler`, `re-noised at 1000, 833`: all but the number of Euler steps."""
    rungs = ", ".join(f"{1000 * sigma:.0f}" for sigma in spec.sigmas[:-1])
    words = ("streamed " if spec.streaming else "") + ("Euler" if spec.solver == "ode" else f"re-noised at {rungs}")
    return words + (f", guidance {spec.guidance_scale:g}" if spec.guidance_scale != 1 else "")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the standard form `u + g (c - u)` (arXiv:2207.12598 with g = w + 1), float32.

    The other convention `c + g' (c - u)` is g = g' + 1.
    """
    wide = torch.promote_types(conditional.dtype, torch.float32)
    conditional, unconditional = conditional.to(wide), unconditional.to(wide)
    return unconditional + scale * (conditional - unconditional)


def euler_states(velocity_fn: VelocityFn, x: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """The states of `euler`, one at each of `sigmas`, beginning with x."""
    yield x
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (next_sigma - sigma) * velocity_fn(x, level(x, sigma)).to(x.dtype)
        yield x


def euler(velocity_fn: VelocityFn, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate dx/dsigma = v from `sigmas[0]` to `sigmas[-1]` by Euler steps `x' = x + (sigma' - sigma) v`.

    x `[B, T, C, H, W]` is pure noise when `sigmas[0] == 1`.
    """
    for state in euler_states(velocity_fn, x, sigmas):
        x = state
    return x


def renoise(velocity_fn: VelocityFn, x: Tensor, sigmas: Sequence[float], fresh: FreshNoise) -> Tensor:
    """Few-step sampling with fresh noise (consistency models, arXiv:2303.01469 algorithm 1; DMD2, arXiv:2405.14867):
    `x0 = x - sigma v`, `x' = (1 - sigma') x0 + sigma' fresh`. The result is at `sigmas[-1]`, clean when that is 0."""
    for rung, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True), 1):
        x0 = x - sigma * velocity_fn(x, level(x, sigma)).to(x.dtype)
        x = (1 - next_sigma) * x0 + next_sigma * fresh(rung) if next_sigma else x0
    return x


def level(x: Tensor, sigma: float) -> Tensor:
    """`[B, T]` filled with sigma, for x `[B, T, C, H, W]`."""
    return torch.full(x.shape[:2], sigma, dtype=torch.float32, device=x.device)


def solve(spec: SamplerSpec, velocity_fn: VelocityFn, x: Tensor, fresh: FreshNoise | None) -> Tensor:
    """x, noise, taken down the spec's ladder by its solver; to `sigmas[-1]`."""
    if spec.solver == "ode":
        return euler(velocity_fn, x, spec.sigmas)
    assert fresh is not None, "the sde solver needs fresh noise"
    return renoise(velocity_fn, x, spec.sigmas, fresh)


def guided(model: ModelBase, cond: Conditioning, uncond: Conditioning | None, scale: float) -> VelocityFn:
    """The model's velocity with guidance; `uncond` may be None when `scale` is 1."""

    def velocity_fn(x: Tensor, sigma: Tensor) -> Tensor:
        conditional = model.predict_velocity(x, sigma, cond)
        return conditional if scale == 1 else guide(conditional, model.predict_velocity(x, sigma, uncond), scale)

    return velocity_fn


def stream(
    model: CausalModelBase,
    spec: SamplerSpec,
    noise: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None,
    fresh: FreshNoise | None = None,
    solver: Solver | None = None,
) -> Iterator[Tensor]:
    """The blocks of a video, `[B, t, C, H, W]` each, one after another from `noise`, over a KV cache.

    With guidance the conditional and the unconditional pass run as one batch of twice the size, over one cache. `solver`
    takes the place of the spec's.
    """
    has_guidance = spec.guidance_scale != 1
    both = cond.and_then(uncond) if has_guidance else cond
    copies = 2 if has_guidance else 1
    cache = model.new_cache((copies * noise.shape[0], *noise.shape[1:]), recycle=True)

    for start, end in block_starts(model.causal.blocks(noise.shape[1])):

        def velocity_fn(x: Tensor, sigma: Tensor, start: int = start) -> Tensor:
            v = model.predict_velocity_streaming(
                x.repeat(copies, 1, 1, 1, 1), sigma.repeat(copies, 1), both, cache, start
            )
            return guide(*v.chunk(2), spec.guidance_scale) if has_guidance else v

        def fresh_block(rung: int, start: int = start, end: int = end) -> Tensor:
            return fresh(rung)[:, start:end]

        block = (solver or partial(solve, spec))(velocity_fn, noise[:, start:end], fresh and fresh_block)
        yield block
        if end < noise.shape[1]:
            noised = spec.context_noise
            if noised:
                assert fresh is not None, "a noised context needs fresh noise"
                block = (1 - noised) * block + noised * fresh_block(len(spec.sigmas) - 1)
            model.commit(block.repeat(copies, 1, 1, 1, 1), both, cache, start, noised)


def sample(
    model: ModelBase,
    spec: SamplerSpec,
    noise: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None,
    fresh: FreshNoise | None = None,
) -> Tensor:
    """Latents `[B, T, C, H, W]` from `noise`, as `spec` says. `uncond` is needed unless `spec.guidance_scale == 1`, `fresh`
    for the sde solver and for `spec.context_noise`."""
    if spec.streaming:
        return torch.cat(list(stream(model, spec, noise, cond, uncond, fresh)), dim=1)

    return solve(spec, guided(model, cond, uncond, spec.guidance_scale), noise, fresh)
