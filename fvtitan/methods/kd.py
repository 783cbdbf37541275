"""Knowledge distillation onto the teacher's ODE trajectories: ODE initialisation of few-step and causal students.

The teacher's sampler is a fixed map from noise to video. Its trajectories are computed once (`fvtitan.trajectories`) and the
student learns to jump from any of K states to the end. KDCausal: a rung of its own for every block (CausVid, arXiv:2412.07772;
Self-Forcing, arXiv:2506.08009); with an autoregressive teacher, Causal-Forcing (arXiv:2602.02214).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fvtitan import flow_matching
from fvtitan.data.trajectory_cache import TrajectoryCache, num_complete
from fvtitan.distributed.utils import free_memory, on_rank_zero
from fvtitan.errors import UserError
from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.methods.base import MethodConfig, TrainingMethod, check_no_heldout_loss, check_num_frames_per_block
from fvtitan.methods.passes import Pass
from fvtitan.models import families
from fvtitan.models.base import CausalModelBase, ModelBase
from fvtitan.models.blocks import per_frame
from fvtitan.samplers import SamplerSpec

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


@dataclass
class KDConfig(MethodConfig):
    """[method] name = "kd" """

    name: Literal["kd"] = "kd"
    """Training method."""
    teacher_path_cache: str = ""
    """Folder of the teacher's trajectories. An incomplete one is filled when there is a [models.teacher], or beforehand by
    `python -m fvtitan.trajectories CONFIG`. kd and kd_causal share it."""
    num_trajectories: int = 1000
    """Trajectories of a complete cache; prompts are taken in turn, each time with new noise."""
    teacher_inference_steps: int = 48
    """Euler steps of the teacher."""
    teacher_guidance_scale: float = 6.0
    """Guidance of the teacher, u + g (c - u). The other convention, c + g' (c - u), is g = g' + 1."""
    t_list: tuple[float, ...] = ()
    """The student's timesteps (0 - 1000) after the shift, descending to 0, each near a step of the teacher's ladder. Empty:
    `student_sample_steps` evenly spaced ones before the shift."""
    student_sample_steps: int = 4
    """Steps of the student."""
    student_sample_type: Literal["sde", "ode"] = "sde"
    """How the student is sampled: re-noised with fresh noise, or with the noise its prediction implies."""
    cache_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """In which the trajectories are stored; float64 also integrates in it."""
    store_whole_trajectories: bool = False
    """Store all states, for students with other steps; the disk that it needs grows by (teacher_inference_steps + 1) /
    (student_sample_steps + 1)."""

    def check(self, cfg: JobConfig) -> None:
        if not cfg.models["student"].trainable:
            raise UserError(f"models.student.trainable = false: {self.name} would have nothing to train")
        if not self.teacher_path_cache:
            raise UserError("method.teacher_path_cache is empty: give the folder of the teacher's trajectories")
        for key in ("num_trajectories", "teacher_inference_steps", "student_sample_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"method.{key} = {getattr(self, key)}: must be >= 1")
        if self.teacher_guidance_scale < 0:
            raise UserError(f"method.teacher_guidance_scale = {self.teacher_guidance_scale}: must be >= 0")
        self.rungs(cfg.schedule.shift)
        if "teacher" in cfg.models:
            self.check_teacher(cfg)
        check_no_heldout_loss(cfg)

    def check_teacher(self, cfg: JobConfig) -> None:
        teacher = cfg.models["teacher"]
        if teacher.trainable:
            raise UserError(f"models.teacher.trainable: {self.name} needs false, the teacher is frozen")
        if not teacher.init_from:
            raise UserError("models.teacher.init_from is empty: a teacher needs pretrained weights")
        if teacher.is_causal != self.autoregressive:
            raise UserError(
                f"models.teacher.name = {teacher.name!r}: these trajectories are made by a "
                f"{families(causal=self.autoregressive)} teacher"
            )

    @property
    def autoregressive(self) -> bool:
        """Whether the trajectories are those of a causal teacher, block by block."""
        return False

    def rungs(self, shift: float) -> tuple[int, ...]:
        """Where the student's steps lie on the teacher's ladder: indices of its sigmas. Raises `UserError` for steps that
        are not on it."""
        steps, count = self.teacher_inference_steps, self.student_sample_steps
        ladder = flow_matching.euler_ladder(steps, shift)
        if not self.t_list:
            if steps % count:
                near = sorted({max(count, steps // count * count), (steps // count + 1) * count})
                raise UserError(
                    f"method.student_sample_steps = {count} does not divide teacher_inference_steps = {steps}: the student's "
                    f"steps would not be the teacher's; nearest: {' or '.join(map(str, near))}; or give t_list"
                )
            return tuple(range(0, steps, steps // count))
        if len(self.t_list) != count + 1 or self.t_list[-1] != 0:
            raise UserError(
                f"method.t_list = {list(self.t_list)}: need student_sample_steps + 1 = {count + 1} timesteps, the last one 0"
            )
        indices = []
        for timestep in self.t_list[:-1]:
            if not 0 < timestep <= NUM_TIMESTEPS:
                raise UserError(f"method.t_list = {list(self.t_list)}: {timestep:g} is not a timestep in (0, 1000]")
            sigma = timestep / NUM_TIMESTEPS
            index = min(range(steps), key=lambda i: abs(ladder[i] - sigma))
            neighbours = [abs(ladder[index] - ladder[i]) for i in (index - 1, index + 1) if i >= 0]
            if abs(ladder[index] - sigma) > min(neighbours) / 2:
                raise UserError(
                    f"method.t_list: {timestep:g} is not near a step of the teacher's ladder (teacher_inference_steps = "
                    f"{steps}, shift {shift:g}); the nearest is {NUM_TIMESTEPS * ladder[index]:.4g}"
                )
            indices.append(index)
        if sorted(set(indices)) != indices or indices[0] != 0:
            raise UserError(
                f"method.t_list = {list(self.t_list)}: need descending timesteps that begin at 1000, each another step of the "
                "teacher's ladder"
            )
        return tuple(indices)

    def ladder(self, shift: float) -> tuple[float, ...]:
        """The student's sigmas and the final 0: exactly the teacher's."""
        ladder = flow_matching.euler_ladder(self.teacher_inference_steps, shift)
        return (*[ladder[i] for i in self.rungs(shift)], 0.0)

    def stored(self, shift: float) -> tuple[int, ...]:
        """Indices of the teacher's ladder whose states are in the cache."""
        return tuple(range(self.teacher_inference_steps)) if self.store_whole_trajectories else self.rungs(shift)


@dataclass
class KDCausalConfig(KDConfig):
    """[method] name = "kd_causal" """

    name: Literal["kd_causal"] = "kd_causal"
    """Training method."""
    teacher_forcing: bool = False
    """The trajectories are those of an autoregressive teacher (wan_causal), block by block on its own clean blocks, and the
    student sees the same clean blocks (Causal-Forcing)."""
    num_frames_per_block: int | None = None
    """The same as models.student.frames_per_block, for recipes that have it here; must agree with it."""

    def check(self, cfg: JobConfig) -> None:
        super().check(cfg)
        check_num_frames_per_block(self.num_frames_per_block, cfg)

    def check_teacher(self, cfg: JobConfig) -> None:
        super().check_teacher(cfg)
        student, teacher = cfg.models["student"].causal(), cfg.models["teacher"].causal()
        if self.teacher_forcing and student != teacher:
            raise UserError(
                f"method.teacher_forcing: models.student and models.teacher must see time alike, but one is {student} and the "
                f"other {teacher}"
            )

    @property
    def autoregressive(self) -> bool:
        return self.teacher_forcing


class KDMethod(TrainingMethod):
    """Regress a trajectory's end from one of its states, a rung a sample."""

    Config = KDConfig
    optional_roles: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(self, *, cfg: JobConfig, role_models: dict[str, ModelBase]):
        super().__init__(cfg=cfg, role_models=role_models)
        self.sigmas = torch.tensor(cfg.method.ladder(cfg.schedule.shift)[:-1], device=self.device)

    @classmethod
    def needs_latents(cls, cfg: JobConfig) -> bool:
        return False

    @classmethod
    def needed_roles(cls, cfg: JobConfig) -> list[str]:
        """The teacher only when trajectories are missing."""
        method = cfg.method
        have = on_rank_zero(lambda: num_complete(Path(method.teacher_path_cache), method.num_trajectories))
        return [role for role in cfg.models if role != "teacher" or have < method.num_trajectories]

    @classmethod
    def passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int] | None = None) -> list[Pass]:
        return [Pass(role, cfg.data.latent_size()[0], gradient=True)]

    def on_train_start(self) -> None:
        """Fill the cache when it is incomplete; then the teacher leaves memory."""
        from fvtitan.trajectories import prepare_trajectories

        super().on_train_start()
        teacher = self.role_models.pop("teacher", None)
        self.data: TrajectoryCache = prepare_trajectories(self.cfg, teacher, self.data, self.student.latent_channels)
        del teacher
        free_memory(self.device)

    @classmethod
    def sampler(cls, cfg: JobConfig) -> SamplerSpec:
        """The student's own rungs, without guidance."""
        return SamplerSpec(sigmas=cfg.method.ladder(cfg.schedule.shift), solver=cfg.method.student_sample_type)

    def single_train_step(self, batch: dict[str, Any], step: int, role: str) -> tuple[Tensor, dict[str, Tensor]]:
        states, x0 = (batch[key].to(self.device, non_blocking=True) for key in ("states", "latents"))
        wide = torch.promote_types(states.dtype, torch.float32)
        rung = self.draw_rungs(batch, step, role, x0.shape[1])  # [B, T]
        rows = rung[:, None, :, None, None, None].expand(-1, 1, *states.shape[2:])
        noisy, sigma = states.gather(1, rows)[:, 0].to(wide), self.sigmas[rung]
        prediction = self.predict_x0(noisy, sigma, x0.to(wide), batch)
        return 0.5 * (prediction - x0.to(wide)).square().mean(), {}

    def draw_rungs(self, batch: dict[str, Any], step: int, role: str, num_frames: int) -> Tensor:
        """Which state each frame is taken from, `[B, T]`, one a sample. The end itself is never drawn."""
        uniform = self.streams(batch, step, role).rand("rung", 1)
        return (uniform * len(self.sigmas)).long().expand(-1, num_frames)

    def predict_x0(self, noisy: Tensor, sigma: Tensor, x0: Tensor, batch: dict[str, Any]) -> Tensor:
        """The student's jump to the end, `[B, T, C, H, W]`."""
        return self.student.predict_x0(noisy, sigma, self.conditioning(batch))


class KDCausalMethod(KDMethod):
    """The same for a causal student, a rung a block."""

    Config = KDCausalConfig
    causal_student: ClassVar[bool] = True
    student: CausalModelBase

    @classmethod
    def passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int] | None = None) -> list[Pass]:
        attention = "clean_context" if cfg.method.teacher_forcing else "block_causal"
        return [Pass(role, cfg.data.latent_size()[0], gradient=True, attention=attention)]

    @classmethod
    def sampler(cls, cfg: JobConfig) -> SamplerSpec:
        """Streaming, block by block, on the student's own rungs, without guidance."""
        ladder = cfg.method.ladder(cfg.schedule.shift)
        return SamplerSpec(sigmas=ladder, solver=cfg.method.student_sample_type, streaming=True)

    def draw_rungs(self, batch: dict[str, Any], step: int, role: str, num_frames: int) -> Tensor:
        """Which state each frame is taken from, `[B, T]`, one a block."""
        blocks = self.student.causal.blocks(num_frames)
        uniform = self.streams(batch, step, role).rand("rung", len(blocks))
        return per_frame((uniform * len(self.sigmas)).long(), blocks)

    def predict_x0(self, noisy: Tensor, sigma: Tensor, x0: Tensor, batch: dict[str, Any]) -> Tensor:
        if not self.cfg.method.teacher_forcing:
            return super().predict_x0(noisy, sigma, x0, batch)
        cond, clean = self.conditioning(batch), torch.zeros_like(sigma)
        velocity = self.student.predict_velocity_with_context(noisy, sigma, x0, clean, cond)
        return flow_matching.velocity_to_x0(noisy, velocity, sigma)
