"""FLOPs of what is measured, by the closed forms of `fvtitan.flops`, and the time an H100 / H200 would need at best."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fvtitan.flops import PEAK_TFLOPS, Flops, roofline_seconds
from fvtitan.methods.passes import Pass
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.wan.flops import forward_flops
from fvtitan.models.wan.transformer import WanConfig

GPU_PEAK_FLOPS = 1e12 * PEAK_TFLOPS["H100"]  # what MFU is measured against


@dataclass(frozen=True)
class Work:
    """Forwards, with their backwards or without."""

    forward: Flops
    backward: bool = False
    mode: str = "none"
    """Activation checkpointing."""
    kernel: str = "cudnn"

    @property
    def model_flops(self) -> float:
        """Without recomputation."""
        return self.forward.total + (self.forward.backward if self.backward else 0.0)

    @property
    def flops(self) -> float:
        """With recomputation."""
        return self.model_flops + (self.forward.recomputed(self.mode) if self.backward else 0.0)

    def seconds(self) -> float:
        return roofline_seconds(
            self.forward, GPU_PEAK_FLOPS, gradient=self.backward, mode=self.mode, kernel=self.kernel
        )


def network(sizes: WanConfig, latents: tuple[int, ...], causal: CausalConfig | None = None, **keys) -> Flops:
    """Forwards of the network for one sample of latents `[..., T, C, H, W]`; keys of `Pass`."""
    frames, _, height, width = latents[-4:]
    return forward_flops(Pass("student", frames, **keys), sizes, causal, height, width)


def block(sizes: WanConfig, latents: tuple[int, ...]) -> Flops:
    """The forward of one block."""
    one = network(dataclasses.replace(sizes, num_layers=1), latents)
    return dataclasses.replace(one, ends=0.0)
