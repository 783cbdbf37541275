"""Diffusion forcing: supervised fine-tuning of a causal student with one noise level per block (arXiv:2407.01392)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fvtitan import flow_matching
from fvtitan.errors import UserError
from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.methods.base import MethodConfig, TrainingMethod, check_num_frames_per_block
from fvtitan.methods.finetune import flow_matching_loss
from fvtitan.methods.passes import Pass
from fvtitan.models.base import CausalModelBase, Conditioning
from fvtitan.models.blocks import per_frame
from fvtitan.samplers import SamplerSpec

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


@dataclass
class DiffusionForcingSFTConfig(MethodConfig):
    """[method] name = "dfsft" """

    name: Literal["dfsft"] = "dfsft"
    """Training method."""
    loss_weighting: Literal["none", "bell"] = "bell"
    """Loss weight by a block's own noise level: none, or the bell around sigma 0.5 of CausVid's causal training."""
    teacher_forcing: bool = False
    """Blocks see the clean blocks before them instead of the noisy ones: the sequence is [clean | noisy]."""
    context_noise_max: float = 0.0
    """teacher_forcing: the clean half is noised to a timestep drawn uniformly up to this, one a sample (0 - 1000)."""
    num_frames_per_block: int | None = None
    """The same as models.student.frames_per_block, for recipes that have it here; must agree with it."""

    def check(self, cfg: JobConfig) -> None:
        if not cfg.models["student"].trainable:
            raise UserError("models.student.trainable = false: dfsft would have nothing to train")
        if not 0 <= self.context_noise_max < NUM_TIMESTEPS:
            raise UserError(f"method.context_noise_max = {self.context_noise_max}: a timestep, in [0, 1000)")
        if self.context_noise_max and not self.teacher_forcing:
            raise UserError("method.context_noise_max has no effect without method.teacher_forcing = true")
        check_num_frames_per_block(self.num_frames_per_block, cfg)


class DiffusionForcingSFTMethod(TrainingMethod):
    """One noise level per block, independent across blocks, shared by the frames of a block; regress the velocity."""

    Config = DiffusionForcingSFTConfig
    causal_student: ClassVar[bool] = True
    student: CausalModelBase

    @classmethod
    def passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int] | None = None) -> list[Pass]:
        attention = "clean_context" if cfg.method.teacher_forcing else "block_causal"
        return [Pass(role, cfg.data.latent_size()[0], gradient=True, attention=attention)]

    def single_train_step(self, batch: dict[str, Any], step: int, role: str) -> tuple[Tensor, dict[str, Tensor]]:
        method = self.cfg.method
        x0 = batch["latents"].to(self.device, torch.float32, non_blocking=True)  # [B, T, C, H, W]
        blocks = self.student.causal.blocks(x0.shape[1])
        streams = self.streams(batch, step, role)
        sigma = self.draw_sigma(streams.rand("sigma", len(blocks)), blocks)
        noise = streams.randn("noise", *x0.shape[1:])
        noisy, cond = self.student.add_noise(x0, noise, sigma), self.conditioning(batch)
        if method.teacher_forcing:
            level = streams.rand("context_sigma", 1) * (method.context_noise_max / NUM_TIMESTEPS)
            level = level.expand(-1, x0.shape[1])
            clean = self.student.add_noise(x0, streams.randn("context_noise", *x0.shape[1:]), level)
            prediction = self.student.predict_velocity_with_context(noisy, sigma, clean, level, cond)
        else:
            prediction = self.student.predict_velocity(noisy, sigma, cond)
        weight = flow_matching.loss_weight(sigma, method.loss_weighting, self.cfg.schedule.shift)
        return flow_matching_loss(prediction, flow_matching.velocity(x0, noise), weight), {}

    def draw_sigma(self, uniform: Tensor, blocks: tuple[int, ...]) -> Tensor:
        """Uniform draws `[B, blocks]` -> sigma `[B, T]`, one level per block."""
        return per_frame(flow_matching.sample_sigma(uniform, self.cfg.schedule), blocks)

    @classmethod
    def sampler(cls, cfg: JobConfig) -> SamplerSpec:
        """Streaming, block by block, by Euler steps on the run's own schedule, with guidance."""
        validation = cfg.validation
        sigmas = flow_matching.euler_ladder(validation.sampling_steps, cfg.schedule.shift)
        return SamplerSpec(sigmas=tuple(sigmas), guidance_scale=validation.guidance_scale, streaming=True)

    def heldout_loss(self, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        if not self.cfg.method.teacher_forcing:
            return super().heldout_loss(x0, noise, sigma, cond)
        noisy = flow_matching.add_noise(x0, noise, sigma)
        v = self.student.predict_velocity_with_context(noisy, sigma, x0, torch.zeros_like(sigma), cond)
        return (v - flow_matching.velocity(x0, noise)).square().flatten(1).mean(1)
