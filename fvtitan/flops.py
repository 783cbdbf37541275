"""FLOPs in closed form, 2 a multiply-add: matrix products and attention, as torch's FlopCounterMode counts them; not norms,
RoPE, activations, optimizers. Those of a forward are the model family's own (`ModelBase.forward_flops`).

A backward is taken as two forwards, as is usual (arXiv:2204.02311, appendix B): 3 F a pass with gradient. It is less by the
gradients of the network's inputs, which nobody needs (1.5e-5 of it for the 1.3B at 81 frames of 480 x 832). Hardware FLOPs
add what activation checkpointing repeats, not the scores that fused attention makes again in its own backward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fvtitan.config import JobConfig
    from fvtitan.methods.passes import Pass

PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L40S": 362.0,
}
"""Dense bfloat16 TFLOP/s of the vendor's data sheets by words of the device's name; the first entry that fits."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of forwards, by place."""

    linear: float = 0.0
    """The blocks' projections and feed-forwards."""
    self_attention: float = 0.0
    """Scores and weighted sums over the keys that are seen."""
    cross_attention: float = 0.0
    """The same over the text."""
    ends: float = 0.0
    """Before and after the blocks: patches, text, noise level, head."""
    adapters: float = 0.0
    """Of a role that is an adapter: what it adds to the blocks' projections."""

    @property
    def attention(self) -> float:
        return self.self_attention + self.cross_attention

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.ends + self.adapters

    @property
    def backward(self) -> float:
        """Twice the forward; of an adapter's pass without the gradients of the weights under it (and of its ends, which are
        little)."""
        if self.adapters:
            return self.linear + 2 * (self.attention + self.adapters)
        return 2 * self.total

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, n: float) -> Flops:
        return Flops(*(n * part for part in astuple(self)))

    def recomputed(self, mode: str) -> float:
        """What backward computes again under `activation_checkpoint.mode`: the blocks; "selective" keeps what attention
        gave."""
        linear = self.linear + self.adapters
        return {"none": 0.0, "selective": linear, "full": linear + self.attention}[mode]


@dataclass(frozen=True)
class PhaseFlops:
    """FLOPs of one phase: those that it needs, and with those that activation checkpointing repeats."""

    model: float = 0.0
    hardware: float = 0.0

    def __add__(self, other: PhaseFlops) -> PhaseFlops:
        return PhaseFlops(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, factor: float) -> PhaseFlops:
        return PhaseFlops(factor * self.model, factor * self.hardware)


def phase_flops(
    cfg: JobConfig, passes: Iterable[Pass], sizes: Mapping[str, Any], height: int, width: int
) -> PhaseFlops:
    """Forwards and backwards of a method's passes for one video of height x width latents; `sizes` by role."""
    model = hardware = 0.0
    for p in passes:
        forward = role_flops(cfg, p, sizes, height, width)
        needed = forward.total + (forward.backward if p.gradient else 0.0)
        model += needed
        hardware += needed + (forward.recomputed(cfg.activation_checkpoint.mode) if p.gradient else 0.0)
    return PhaseFlops(model, hardware)


def role_flops(cfg: JobConfig, p: Pass, sizes: Mapping[str, Any], height: int, width: int) -> Flops:
    """All forwards of a pass, for one video, by the role's family; `sizes` by role."""
    from fvtitan.models import MODELS

    role = cfg.models[p.role]
    return MODELS[role.name].forward_flops(p, sizes[p.role], role, height, width)


GEMM_SHARE = 0.66
"""What large bf16 matrix products reach of an H100's peak (650 TFLOP/s)."""
ATTENTION_SHARES = {"cudnn": (0.60, 0.52), "flash": (0.375, 0.325)}
"""The same for attention by kernel, (forward, backward), at head size 128 and 16k tokens (FlashAttention-3,
arXiv:2407.08608)."""


def roofline_seconds(
    forward: Flops, peak: float, *, gradient: bool = False, mode: str = "none", kernel: str = "cudnn"
) -> float:
    """How long a GPU of so many FLOP/s needs for forwards, with their backwards and what these recompute under
    `activation_checkpoint.mode`, at the rates above. A fused attention's backward makes its scores again: 2.5 forwards."""
    again = forward.recomputed(mode) if gradient else 0.0
    attention_again = forward.attention if again and mode == "full" else 0.0
    backward = forward.backward - 2 * forward.attention if gradient else 0.0
    linear = forward.total - forward.attention + backward + again - attention_again
    ahead, back = (share * peak for share in ATTENTION_SHARES[kernel])
    attended = (forward.attention + attention_again) / ahead + (2.5 * forward.attention / back if gradient else 0.0)
    return linear / (GEMM_SHARE * peak) + attended


def device_rates(flops: PhaseFlops, seconds: float, num_devices: int, peak_tflops: float = 0.0) -> dict[str, float]:
    """`perf/...` of the whole job's FLOPs in so many seconds: model TFLOP/s a device and, where the peak is known (not 0),
    the shares of it that the model's (MFU) and the hardware's (HFU) are."""
    scale = 1e-12 / (seconds * num_devices)
    rates = {"perf/tflops_per_device": scale * flops.model}
    if peak_tflops:
        rates |= {"perf/mfu": scale * flops.model / peak_tflops, "perf/hfu": scale * flops.hardware / peak_tflops}
    return rates


def peak_tflops(device: torch.device) -> float:
    """Dense bfloat16 TFLOP/s of a GPU by its name; 0: not known."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def named_peak(name: str) -> float:
    """The entry of `PEAK_TFLOPS` for a device's name, 0 without one."""
    words = set(re.split(r"\W+", name))
    return next((peak for entry, peak in PEAK_TFLOPS.items() if words.issuperset(entry.split())), 0.0)
