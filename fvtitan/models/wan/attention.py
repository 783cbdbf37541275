"""Rotary position embedding over (T, H, W) and the attention front-end: full, block-causal, or over a KV cache."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fvtitan.distributed.utils import use_private_compile_cache
from fvtitan.models.blocks import Runs, block_starts, earlier_frames

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# cuDNN is 1.4 times as fast as FlashAttention 2 on Hopper at Wan's head size; a CPU has flash and math.
KERNELS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
DETERMINISTIC_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)  # the backward of the others is not


@contextlib.contextmanager
def pinned_kernels(deterministic: bool) -> Iterator[str]:
    """Inside, scaled_dot_product_attention takes the first kernel of the list that can; yields the list in words."""
    kernels = DETERMINISTIC_KERNELS if deterministic else KERNELS
    with sdpa_kernel(list(kernels), set_priority=True):
        yield " > ".join(map(_in_words, kernels))


def chosen_kernel(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that scaled_dot_product_attention takes here, with gradient, for queries, keys and values
    `[B, S, heads, head_dim]`, in words."""
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
    return _in_words(SDPBackend(torch._fused_sdp_choice(x, x, x)))


def _in_words(kernel: SDPBackend) -> str:
    return kernel.name.removesuffix("_ATTENTION").lower()


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with (T, H, W)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_frequencies(dim: int) -> Tensor:
    """Radians per position of each channel pair, float64 `[dim / 2]`."""
    return 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@functools.lru_cache(maxsize=64)
def rope_table(
    frames: int, height: int, width: int, head_dim: int, start_frame: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[frames * height * width, 1, head_dim / 2]` of the 3-D rotary embedding (RoFormer, arXiv:2104.09864).

    The channels of a head are split over (T, H, W) as Wan does: H and W get `2 * (head_dim // 6)` each, T the rest;
    theta 10000, angles in float64. Computed, not stored: a buffer would not survive meta initialisation.
    """
    positions = (torch.arange(start_frame, start_frame + frames), torch.arange(height), torch.arange(width))
    t, h, w = (
        torch.outer(position.double(), rope_frequencies(dim))
        for position, dim in zip(positions, rope_split(head_dim), strict=True)
    )
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
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # fused there; inductor generates no code for complex numbers
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # the same as one operation
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class BlockCausal:
    """Block-causal self-attention: a frame sees its own block and earlier ones, within a window.

    With `clean_context` the sequence is `[clean | noisy]`, twice the frames (teacher forcing): a noisy block sees itself
    and the clean blocks before it, never its own clean copy; clean blocks are block-causal among themselves.
    """

    blocks: tuple[int, ...]
    window: int = -1
    sink: int = 0
    clean_context: bool = False
    backend: Literal["sdpa", "flex"] = "sdpa"

    @property
    def num_frames(self) -> int:
        """Latent frames of the sequence, both halves counted."""
        return sum(self.blocks) * (2 if self.clean_context else 1)

    def visible(self) -> list[tuple[tuple[int, int], Runs]]:
        """For each block of queries, in the order of the sequence, the frames it may attend to."""
        spans = block_starts(self.blocks)
        seen = []
        for start, end in spans:
            earlier = earlier_frames(start, end, self.window, self.sink)
            whole = earlier and earlier[-1][1] == start
            seen.append(((start, end), (*earlier[:-1], (earlier[-1][0], end)) if whole else (*earlier, (start, end))))
        if not self.clean_context:
            return seen
        offset = sum(self.blocks)
        noisy = [
            (
                (start + offset, end + offset),
                (*earlier_frames(start, end, self.window, self.sink), (start + offset, end + offset)),
            )
            for start, end in spans
        ]
        return seen + noisy

    def frame_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """bool `[frames, frames]`: which frame (row) may attend to which (column)."""
        mask = torch.zeros(self.num_frames, self.num_frames, dtype=torch.bool)
        for (start, end), runs in self.visible():
            for low, high in runs:
                mask[start:end, low:high] = True
        return mask.to(device)


AttentionMask: TypeAlias = "BlockCausal | BlockMask | None"


def prepare(plan: BlockCausal, tokens_per_frame: int, device: torch.device) -> AttentionMask:
    """The plan as the blocks of a network take it, the same object for the same shapes: None when everything is visible,
    FlexAttention's mask for `flex` (built outside the compiled blocks), the plan itself for `sdpa`."""
    if len(plan.blocks) == 1 and not plan.clean_context:
        return None
    return block_mask(plan, tokens_per_frame, device) if plan.backend == "flex" else plan


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionMask = None) -> Tensor:
    """Softmax attention. q `[B, S, heads, head_dim]`, k and v `[B, S', heads, head_dim]` -> q's shape.

    Without a plan every query sees every key. With one, as `prepare` gives it, q, k and v are the tokens of its frames:
    `sdpa` makes one call a block over just the keys it sees (any device, with backward), a FlexAttention mask one call
    (forward only on a CPU).
    """
    if plan is None:
        return _sdpa(q, k, v)
    if not isinstance(plan, BlockCausal):
        return _flex(q, k, v, plan)
    tokens = q.shape[1] // plan.num_frames
    out = []
    for (start, end), runs in plan.visible():
        keys, values = (gather(x, tuple((low * tokens, high * tokens) for low, high in runs)) for x in (k, v))
        out.append(_sdpa(q[:, start * tokens : end * tokens], keys, values))
    return torch.cat(out, dim=1)


def gather(x: Tensor, runs: Runs) -> Tensor:
    """The given ranges of dimension 1, one behind the other; a view when there is one."""
    parts = [x[:, low:high] for low, high in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@functools.lru_cache(maxsize=32)
def block_mask(plan: BlockCausal, tokens: int, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a plan whose frames have so many tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    frames = plan.frame_mask(device)

    def allowed(_batch, _head, query, key):
        return frames[query // tokens, key // tokens]

    length = frames.shape[0] * tokens
    return create_block_mask(allowed, None, None, length, length, device=device)


# The call is one operator then, which selective activation checkpointing can see and keep the output of.
FLEX_OPTIONS = {"wrap_inductor_compiled_regions": True}


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    use_private_compile_cache()
    return torch.compile(flex_attention, options=FLEX_OPTIONS)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Eager FlexAttention makes the whole score matrix: only the compiled one is a kernel.
    call = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask).transpose(1, 2)
