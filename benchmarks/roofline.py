"""FLOPs of the Wan transformer in closed form, and the time that an H100 / H200 would need for them at best.

FLOP = 2 x multiply-add. d = dim, f = ffn_dim, L = layers, S = video tokens, C = text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvtitan.models.wan.transformer import WanConfig

GPU_PEAK_FLOPS = 989e12  # bf16 dense, the datasheet of the H100 and H200: what MFU is measured against
GEMM_RATE = 650e12  # achieved by bf16 matrix products of Wan's sizes
ATTENTION_RATE = {  # (forward, backward), FlashAttention-3 paper (arXiv:2407.08608), head size 128, 16k tokens
    "cudnn": (595e12, 516e12),
    "flash": (370e12, 322e12),
}


@dataclass(frozen=True)
class Work:
    """FLOPs of linear layers and of attention, forward; `backward` adds theirs, `recompute_*` the parts run twice."""

    linear: float
    attention: float
    backward: bool = False
    recompute_linear: bool = False
    recompute_attention: bool = False
    kernel: str = "cudnn"

    @property
    def model_flops(self) -> float:
        """Forward, or forward and backward at twice the forward: no recomputation."""
        return (self.linear + self.attention) * (3 if self.backward else 1)

    @property
    def flops(self) -> float:
        """With recomputation."""
        return self.model_flops + self.recompute_linear * self.linear + self.recompute_attention * self.attention

    def seconds(self) -> float:
        """At the rates above; attention's backward computes its scores again (2.5 forwards)."""
        forward, backward = ATTENTION_RATE[self.kernel]
        linear = self.linear * ((3 if self.backward else 1) + self.recompute_linear) / GEMM_RATE
        attention = self.attention * (1 + self.recompute_attention) / forward
        return linear + attention + (2.5 * self.attention / backward if self.backward else 0.0)


def block_flops(sizes: WanConfig, tokens: int) -> tuple[float, float]:
    """(linear, attention) FLOPs of one block's forward for one sample of `tokens` video tokens."""
    d, text = sizes.dim, sizes.text_len
    linear = 12 * tokens * d**2 + 4 * tokens * d * sizes.ffn_dim + 4 * text * d**2
    return linear, 4 * tokens * (tokens + text) * d


def forward_flops(sizes: WanConfig, tokens: int, visible: float = 1.0) -> tuple[float, float]:
    """(linear, attention) FLOPs of the network's forward for one sample. `visible`: the share of self-attention's scores
    that is computed (block-causal with N equal blocks: (N + 1) / 2N)."""
    d, patch = sizes.dim, sizes.in_channels * 4 + sizes.out_channels * 4
    linear, _ = block_flops(sizes, tokens)
    attention = 4 * tokens * (visible * tokens + sizes.text_len) * d
    outside = 2 * tokens * patch * d + 2 * sizes.text_len * d * (sizes.text_dim + d)
    return sizes.num_layers * linear + outside, sizes.num_layers * attention
