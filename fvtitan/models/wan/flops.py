"""FLOPs of Wan transformers in closed form, counted as `fvtitan.flops` says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fvtitan.flops import Flops
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.wan.attention import BlockCausal
from fvtitan.models.wan.transformer import WanConfig

if TYPE_CHECKING:
    from fvtitan.components.lora import LoRAConfig
    from fvtitan.methods.passes import Pass

VIDEO_LAYERS = (*(f"self_attn.{name}" for name in "qkvo"), "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
TEXT_LAYERS = ("cross_attn.k", "cross_attn.v")


def _adapters(lora: LoRAConfig | None, sizes: WanConfig, layers: Iterable[str]) -> int:
    """FLOPs a token of the adapters on the named layers of all blocks."""
    if lora is None:
        return 0
    wide = {"ffn.0": sizes.ffn_dim, "ffn.2": sizes.ffn_dim}
    outer = sum(sizes.dim + wide.get(name, sizes.dim) for name in layers if lora.adapts(name))
    return 2 * lora.rank * outer * sizes.num_layers


def _forward(
    sizes: WanConfig, tokens_per_frame: int, frames: int, seen: int, out_frames: int, lora: LoRAConfig | None
) -> Flops:
    """One forward of one video, but for what is done to its text. seen: pairs of a frame and one that it sees; out_frames:
    those that reach the head."""
    dim, layers, tokens = sizes.dim, sizes.num_layers, frames * tokens_per_frame
    patch = math.prod(sizes.patch_size)
    return Flops(
        linear=layers * tokens * (12 * dim * dim + 4 * dim * sizes.ffn_dim),  # 4 of self-attention, 2 of cross, ffn
        self_attention=layers * 4 * dim * seen * tokens_per_frame**2,
        cross_attention=layers * 4 * dim * tokens * sizes.text_len,
        ends=2 * dim * tokens * sizes.in_channels * patch
        + 2 * dim * out_frames * tokens_per_frame * sizes.out_channels * patch
        + 2 * dim * frames * (sizes.freq_dim + 7 * dim),
        adapters=tokens * _adapters(lora, sizes, VIDEO_LAYERS),
    )


def _text(sizes: WanConfig, lora: LoRAConfig | None) -> Flops:
    """The embedding of one text, and its keys and values in every block."""
    dim, tokens = sizes.dim, sizes.text_len
    return Flops(
        linear=sizes.num_layers * tokens * 4 * dim * dim,
        ends=2 * dim * tokens * (sizes.text_dim + dim),
        adapters=tokens * _adapters(lora, sizes, TEXT_LAYERS),
    )


def forward_flops(
    p: Pass, sizes: WanConfig, causal: CausalConfig | None, height: int, width: int, lora: LoRAConfig | None = None
) -> Flops:
    """All forwards of a pass for one video of `p.num_frames` x height x width latents. `causal`: how the role sees time, for
    attention that is not full. `lora`: of a role that is an adapter."""
    if p.attention == "full":
        shapes = [(p.num_frames, p.num_frames**2)]
    else:
        plan = BlockCausal(causal.blocks(p.num_frames), causal.window, causal.sink, p.attention == "clean_context")
        shapes = [
            (end - start, (end - start) * sum(high - low for low, high in runs))
            for (start, end), runs in plan.visible()
        ]
        if p.attention != "streaming":
            frames, seen = zip(*shapes, strict=True)
            shapes = [(sum(frames), sum(seen))]
    tokens_per_frame = height * width // math.prod(sizes.patch_size)
    flops = _text(sizes, lora) * (p.num_forwards if p.texts is None else p.texts)
    for (frames, seen), count in zip(shapes, p.forwards, strict=True):
        out_frames = p.num_frames if p.attention == "clean_context" else frames
        flops += _forward(sizes, tokens_per_frame, frames, seen, out_frames, lora) * count
    return flops * p.batch
