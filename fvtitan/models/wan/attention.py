"""Rotary position embedding over (T, H, W) and the attention front-end."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache(maxsize=64)
def rope_table(
    frames: int, height: int, width: int, head_dim: int, start_frame: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[frames * height * width, 1, head_dim / 2]` of the 3-D rotary embedding (RoFormer, arXiv:2104.09864).

    The channels of a head are split over (T, H, W) as Wan does: H and W get `2 * (head_dim // 6)` each, T the rest;
    theta 10000, angles in float64. Computed, not stored: a buffer would not survive meta initialisation.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for position, dim in (
        (torch.arange(start_frame, start_frame + frames), head_dim - 2 * side),
        (torch.arange(height), side),
        (torch.arange(width), side),
    ):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(position.double(), frequency))
    t, h, w = angles
    grid = torch.cat(
        [
            t[:, None, None].expand(-1, height, width, -1),
            h[None, :, None].expand(frames, -1, width, -1),
            w[None, None, :].expand(frames, height, -1, -1),
        ],
        dim=-1,
    ).reshape(frames * height * width, 1, head_dim // 2)
    return grid.cos().to(device, dtype), grid.sin().to(device, dtype)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channel pairs. x `[B, S, heads, head_dim]`; computed in the table's dtype, returned in x's."""
    cos, sin = rope
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask. q `[B, S, heads, head_dim]`, k and v `[B, S', heads, head_dim]` -> q's shape."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
