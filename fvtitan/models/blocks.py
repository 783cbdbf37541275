"""Latent frames in blocks: the one partition, and the one rule of which earlier frames a block sees.

The attention mask, the noise levels of diffusion forcing, rollouts, samplers, the KV cache and validation all ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvtitan.errors import UserError

Runs = tuple[tuple[int, int], ...]
"""Half-open ranges, ascending and apart from each other."""


def partition(num_frames: int, frames_per_block: int, independent_first_frame: bool = False) -> tuple[int, ...]:
    """Sizes of the blocks of `num_frames` latent frames, in order; with `independent_first_frame` the first block is one
    frame (it holds a single video frame). Raises `UserError` naming the nearest lengths that fit."""
    first = 1 if independent_first_frame else 0
    blocks, rest = divmod(num_frames - first, frames_per_block)
    if num_frames < 1 or rest or blocks + first < 1:
        below = first + max(blocks, 0) * frames_per_block
        nearest = [n for n in (below, below + frames_per_block) if n >= max(1, first)]
        raise UserError(
            f"{num_frames} latent frames do not divide into blocks of {frames_per_block}"
            f"{' after an independent first frame' if first else ''}; nearest: "
            + " or ".join(f"{n} ({4 * n - 3} video frames)" for n in nearest)
        )
    return (1,) * first + (frames_per_block,) * blocks


def per_frame(values: Tensor, blocks: Sequence[int]) -> Tensor:
    """`[B, blocks]` -> `[B, T]`: each frame has its block's value. (`repeat_interleave` wants the sizes on the device, and
    copying them there would wait for it.)"""
    columns = values.split(1, dim=1)
    return torch.cat([column.expand(-1, size) for column, size in zip(columns, blocks, strict=True)], dim=1)


def block_starts(blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """`(start, end)` of every block, in frames."""
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    return [(end - size, end) for end, size in zip(ends, blocks, strict=True)]


def earlier_frames(start: int, end: int, window: int, sink: int) -> Runs:
    """The frames before a block `[start, end)` that it sees: the last ones of the `window` frames up to its own end (-1:
    all), and the first `sink` frames of the video."""
    first = 0 if window < 0 else min(max(0, end - window), start)
    if first <= sink:
        return ((0, start),) if start else ()
    return (((0, sink),) if sink else ()) + (((first, start),) if first < start else ())


@dataclass(frozen=True)
class CausalConfig:
    """How a causal model sees time; from `models.<role>`."""

    frames_per_block: int
    independent_first_frame: bool = False
    window: int = -1
    """Frames a block sees, measured from its end, its own included; -1: all."""
    sink: int = 0
    """First frames of the video that every block sees."""

    def blocks(self, num_frames: int) -> tuple[int, ...]:
        """`partition` of `num_frames` latent frames."""
        return partition(num_frames, self.frames_per_block, self.independent_first_frame)
