"""FineTune: flow-matching supervised fine-tuning (arXiv:2210.02747)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fvtitan import flow_matching
from fvtitan.errors import UserError
from fvtitan.methods.base import MethodConfig, TrainingMethod
from fvtitan.methods.passes import Pass

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


@dataclass
class FineTuneConfig(MethodConfig):
    """[method] name = "finetune" """

    name: Literal["finetune"] = "finetune"
    """Training method."""
    loss_weighting: Literal["none", "bell"] = "none"
    """Loss weight by noise level: none, or the bell around sigma 0.5 of CausVid."""

    def check(self, cfg: JobConfig) -> None:
        if not cfg.models["student"].trainable:
            raise UserError("models.student.trainable = false: finetune would have nothing to train")


def flow_matching_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`mean_B mean_T w (v_hat - v)^2` in float32; prediction and target `[B, T, C, H, W]`, weight `[B, T]`.

    The mean is over a sample's elements first, so every sample weighs the same.
    """
    per_frame = (prediction - target).square().flatten(2).mean(2)  # [B, T]
    return (weight * per_frame).mean(1).mean()


class FineTuneMethod(TrainingMethod):
    """One noise level per sample, the same for all its frames; regress the velocity `eps - x0`."""

    Config = FineTuneConfig

    @classmethod
    def passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int] | None = None) -> list[Pass]:
        return [Pass(role, cfg.data.latent_size()[0], gradient=True)]

    def single_train_step(self, batch: dict[str, Any], step: int, role: str) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = batch["latents"].to(self.device, torch.float32, non_blocking=True)  # [B, T, C, H, W]
        streams = self.streams(batch, step, role)
        sigma = self.draw_sigma(streams.rand("sigma", 1), x0.shape[1])
        noise = streams.randn("noise", *x0.shape[1:])
        noisy = self.student.add_noise(x0, noise, sigma)
        prediction = self.student.predict_velocity(noisy, sigma, self.conditioning(batch))
        weight = flow_matching.loss_weight(sigma, self.cfg.method.loss_weighting, self.cfg.schedule.shift)
        return flow_matching_loss(prediction, flow_matching.velocity(x0, noise), weight), {}

    def draw_sigma(self, uniform: Tensor, num_frames: int) -> Tensor:
        """Uniform draws `[B, 1]` -> sigma `[B, T]`, one level per sample."""
        return flow_matching.sample_sigma(uniform, self.cfg.schedule).expand(-1, num_frames)
