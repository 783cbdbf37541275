"""DMD2: a few-step student whose videos are distributed like the teacher's (arXiv:2405.14867, after arXiv:2311.18828).

The student makes videos by itself (backward simulation). Where teacher and critic, the teacher's copy that follows the
student, would denoise such a video differently, the student's distribution has too much or too little; the student's gradient
is that difference. The critic trains on the student's videos by flow matching, `student_update_interval` times as often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fvtitan import flow_matching
from fvtitan.components.rng import SampleStreams, fold
from fvtitan.components.stateful import Identity, Stateful
from fvtitan.errors import UserError
from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.methods.base import MethodConfig, TrainingMethod, check_no_heldout_loss
from fvtitan.methods.finetune import flow_matching_loss
from fvtitan.methods.passes import Pass, expected
from fvtitan.methods.watch import CollapseWatch
from fvtitan.models import families
from fvtitan.models.base import Conditioning, ModelBase
from fvtitan.samplers import SamplerSpec, guide, level, renoise

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

NORMALISER_FLOOR = 1e-6
HISTOGRAM_STEPS = 100


@dataclass
class DMD2Config(MethodConfig):
    """[method] name = "dmd2" """

    name: Literal["dmd2"] = "dmd2"
    """Training method."""
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """The student's rungs, descending timesteps (0 - 1000), before the shift when `warp_denoising_step`."""
    warp_denoising_step: bool = True
    """Rungs go through schedule.shift: with shift 5, 1000, 750, 500, 250 are the timesteps 1000, 937.5, 833.3, 625."""
    student_update_interval: int = 5
    """The student is trained on steps 1, 1 + this, ...; the critic on every step."""
    rollout: Literal["simulate", "data"] = "simulate"
    """simulate: the student starts from noise and walks its rungs, no video is needed; data: noised videos of the cache."""
    teacher_guidance_scale: float = 4.0
    """Guidance of the teacher's score, u + g (c - u). The other convention, c + g' (c - u), is g = g' + 1."""
    cfg_uncond: Literal["data", "negative", "empty", "keep"] = "data"
    """The prompt of the teacher's unconditional pass: data.uncond_prompt, the negative one, the empty one, or keep the
    conditional one (no guidance)."""
    batched_guidance: bool = False
    """The teacher's conditional and unconditional pass as one pass of twice the batch: the same numbers, more memory."""
    min_score_timestep: float = 20.0
    """Teacher and critic are asked at timesteps from here ..."""
    max_score_timestep: float = 980.0
    """... to here; draws beyond are moved to the end."""

    def check(self, cfg: JobConfig) -> None:
        for role, trainable in (("student", True), ("critic", True), ("teacher", False)):
            if cfg.models[role].trainable != trainable:
                raise UserError(
                    f"models.{role}.trainable: {self.name} needs {str(trainable).lower()}, the {role} is "
                    f"{'trained' if trainable else 'frozen'}"
                )
        for role in ("teacher", "critic"):
            if cfg.models[role].is_causal:
                raise UserError(
                    f"models.{role}.name = {cfg.models[role].name!r}: the scores are bidirectional, {families(causal=False)}"
                )
        if not cfg.models["teacher"].init_from:
            raise UserError("models.teacher.init_from is empty: a teacher needs pretrained weights")
        steps = self.denoising_steps
        if (
            not steps
            or list(steps) != sorted(set(steps), reverse=True)
            or not 0 < steps[-1] <= steps[0] <= NUM_TIMESTEPS
        ):
            raise UserError(
                f"method.denoising_steps = {list(steps)}: need descending timesteps in (0, 1000], e.g. [1000, 750, 500, 250]"
            )
        if steps[0] != NUM_TIMESTEPS:
            raise UserError(
                f"method.denoising_steps = {list(steps)}: sampling starts from noise, so the first one must be 1000"
            )
        if self.student_update_interval < 1:
            raise UserError(f"method.student_update_interval = {self.student_update_interval}: must be >= 1")
        if self.teacher_guidance_scale < 0:
            raise UserError(f"method.teacher_guidance_scale = {self.teacher_guidance_scale}: must be >= 0")
        if self.cfg_uncond == "keep" and self.teacher_guidance_scale != 1:
            raise UserError(
                f'method.cfg_uncond = "keep": teacher_guidance_scale = {self.teacher_guidance_scale} has no effect; set it to 1'
            )
        if not 0 <= self.min_score_timestep < self.max_score_timestep <= NUM_TIMESTEPS:
            raise UserError(
                f"method.min_score_timestep = {self.min_score_timestep}, max_score_timestep = {self.max_score_timestep}: "
                "need 0 <= min < max <= 1000"
            )
        check_no_heldout_loss(cfg)

    def ladder(self, shift: float) -> tuple[float, ...]:
        """The student's rungs as sigmas, and the final 0."""
        return flow_matching.few_step_ladder(self.denoising_steps, shift if self.warp_denoising_step else 1.0)


def distribution_matching_gradient(generated: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """`(fake - real) / mean |generated - real|`, the mean over each sample, at least float32 (DMD eq. 7 and 8, in x0).

    All `[B, T, C, H, W]`: the student's videos, and how teacher and critic denoise their noised versions.
    """
    wide = torch.promote_types(generated.dtype, torch.float32)
    generated, real, fake = generated.to(wide), real.to(wide), fake.to(wide)
    scale = (generated - real).abs().flatten(1).mean(1).clamp_min(NORMALISER_FLOOR)
    return (fake - real) / scale.reshape(-1, *[1] * (generated.ndim - 1))


def distribution_matching_loss(generated: Tensor, gradient: Tensor) -> Tensor:
    """`0.5 mean (x - stopgrad(x - gradient))^2`: its derivative by x is `gradient / numel`. The pseudo-target is never
    rounded to x's precision: a gradient below 2^-8 |x| would vanish in bfloat16."""
    x = generated.to(gradient.dtype)
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def motion_energy(video: Tensor) -> Tensor:
    """Mean squared difference of neighbouring frames, in units of the variance: 0 for a still, 2 for noise. `[B, T, ...]`."""
    return video.diff(dim=1).square().mean() / video.var()


class DMD2Method(TrainingMethod):
    """Student and critic in turns, under a frozen teacher."""

    Config = DMD2Config
    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "critic")

    def __init__(self, *, cfg: JobConfig, role_models: dict[str, ModelBase]):
        super().__init__(cfg=cfg, role_models=role_models)
        self.teacher, self.critic = role_models["teacher"], role_models["critic"]
        for role in ("teacher", "critic"):
            role_models[role].init_preprocessors(cfg, self.data)
        self.sigmas = cfg.method.ladder(cfg.schedule.shift)[:-1]
        uncond = cfg.data.uncond_prompt if cfg.method.cfg_uncond == "data" else cfg.method.cfg_uncond
        self.uncond_embeds = self.data.negative_prompt_embeds if uncond == "negative" else self.data.empty_prompt_embeds
        self.watch = CollapseWatch()
        self._phase: tuple[int, str] = (0, "")
        self._finite: list[dict[str, Tensor]] = []  # of its micro-batches: flags by role

    @classmethod
    def needs_latents(cls, cfg: JobConfig) -> bool:
        return cfg.method.rollout == "data"

    def phases(self, step: int) -> tuple[str, ...]:
        due = (step - 1) % self.cfg.method.student_update_interval == 0
        return ("student", "critic") if due else ("critic",)

    @classmethod
    def sampler(cls, cfg: JobConfig) -> SamplerSpec:
        """The student's own rungs, re-noised with fresh noise, without guidance."""
        return SamplerSpec(sigmas=cfg.method.ladder(cfg.schedule.shift), solver="sde")

    def reference(self) -> tuple[ModelBase, SamplerSpec]:
        return self.teacher, super().sampler(self.cfg)

    def description(self) -> str:
        method = self.cfg.method
        g = method.teacher_guidance_scale
        raw, shifted = ([f"{step:g}" for step in method.denoising_steps], [f"{1000 * s:.4g}" for s in self.sigmas])
        return (
            f"the student's rungs {', '.join(raw)} are the timesteps {', '.join(shifted)} (shift {self.cfg.schedule.shift:g}); "
            f"teacher guidance {g:g} in u + g (c - u) is {g - 1:g} in c + g' (c - u)"
        )

    def latent_shape(self, batch: dict[str, Any]) -> torch.Size:
        if self.needs_latents(self.cfg):
            return super().latent_shape(batch)
        frames, height, width = self.cfg.data.latent_size()
        return torch.Size((len(batch["positions"]), frames, self.student.latent_channels, height, width))

    # ------------------------------------------------------------------------------------------------- passes

    @classmethod
    def passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int] | None = None) -> list[Pass]:
        if rungs is None:
            return expected([cls.passes(cfg, role, drawn) for drawn in cls.possible_exits(cfg)])
        method, frames = cfg.method, cfg.data.latent_size()[0]
        rollout = [p for p in cls.rollout_passes(cfg, role, rungs) if p.num_forwards]
        if role == "critic":
            return [*rollout, Pass("critic", frames, gradient=True)]
        branches = 1 if method.teacher_guidance_scale == 1 else 2
        teacher = Pass("teacher", frames, (float(branches),))
        if method.batched_guidance:
            teacher = Pass("teacher", frames, batch=branches)
        return [*rollout, Pass("critic", frames), teacher]

    @classmethod
    def possible_exits(cls, cfg: JobConfig) -> list[list[int]]:
        """Values of `exit_rungs`, equally likely, that have its mean."""
        return [[rung] for rung in range(len(cfg.method.denoising_steps))]

    @classmethod
    def rollout_passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int]) -> list[Pass]:
        """What `generate` runs in a role's phase."""
        frames, before = cfg.data.latent_size()[0], float(rungs[0]) if cfg.method.rollout == "simulate" else 0.0
        if role == "critic":
            return [Pass("student", frames, (before + 1,))]
        return [Pass("student", frames, (before,)), Pass("student", frames, gradient=True)]

    # ------------------------------------------------------------------------------------------------- phases

    def single_train_step(self, batch: dict[str, Any], step: int, role: str) -> tuple[Tensor, dict[str, Tensor]]:
        if self._phase != (step, role):
            self._phase, self._finite = (step, role), []
        return self.student_step(batch, step) if role == "student" else self.critic_step(batch, step)

    def student_step(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution-matching loss of the student's videos. Teacher and critic only answer, without gradient."""
        streams, prompts = self.streams(batch, step, "student"), self.prompt_embeds(batch)
        generated = self.generate(batch, prompts, streams, step, "student")
        gradient, metrics = self.score(generated.detach(), prompts, streams, step)
        masked = self.masked_frames(step, "student")
        return distribution_matching_loss(generated[:, masked:], gradient[:, masked:]), metrics

    @torch.no_grad()
    def score(
        self, generated: Tensor, prompts: list[Tensor], streams: SampleStreams, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The distribution-matching gradient `[B, T, C, H, W]` of the student's videos, and what to log of it. The whole of it
        is NaN when any video holds NaN or Inf."""
        sigma, noisy = self.noise_for_scores(generated, streams)
        fake = self.critic.predict_x0(noisy, sigma, self.critic.conditioning(prompts))
        real, conditional = self.teacher_x0(noisy, sigma, prompts)
        finite = self.watch_finite({"student": generated, "critic": fake, "teacher": real})
        metrics = {
            "dmd/student_real_distance": (generated - real).abs().mean(),
            "dmd/critic_error_ratio": (generated - fake).square().mean() / (generated - conditional).square().mean(),
        }
        if self.is_finished(step, "student"):
            metrics["dmd/variance_to_teacher"] = generated.var() / real.var()
            if generated.shape[1] > 1:
                metrics["dmd/motion_to_teacher"] = motion_energy(generated) / motion_energy(real)
        return distribution_matching_gradient(generated, real, fake).where(finite, torch.nan), metrics

    def watch_finite(self, videos: dict[str, Tensor]) -> Tensor:
        """Whether the videos of all roles hold neither NaN nor Inf, a 0-d bool; kept by role for `not_finite`."""
        flags = {role: video.isfinite().all() for role, video in videos.items()}
        self._finite.append(flags)
        return torch.stack(list(flags.values())).all()

    def not_finite(self) -> str:
        """Names the roles whose videos held NaN or Inf: the student, or who could not judge its sound videos."""
        for flags in self._finite:
            bad = [role for role, flag in flags.items() if not flag]
            if bad:
                roles = "student" if "student" in bad else " and the ".join(bad)
                return f"the videos of the {roles}"
        return ""

    def critic_step(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of the critic on videos of the student as it is now."""
        streams, prompts = self.streams(batch, step, "critic"), self.prompt_embeds(batch)
        with torch.no_grad():
            generated = self.generate(batch, prompts, streams, step, "critic")
        self.watch_finite({"student": generated})
        sigma, noisy = self.noise_for_scores(generated, streams)
        prediction = self.critic.predict_velocity(noisy, sigma, self.critic.conditioning(prompts))
        target = flow_matching.velocity(generated, streams.randn("score_noise", *generated.shape[1:]))
        loss = flow_matching_loss(prediction, target, torch.ones_like(sigma))
        return loss, self.rollout_metrics(generated, step)

    # ------------------------------------------------------------------------------------------------- rollout

    def generate(
        self, batch: dict[str, Any], prompts: list[Tensor], streams: SampleStreams, step: int, role: str
    ) -> Tensor:
        """Videos `[B, T, C, H, W]` of the student, with the gradient of its last forward alone.

        All ranks and micro-batches of a phase leave the ladder at the same rung, and later rungs are not computed.
        """
        exit_rung, cond = self.exit_rung(step, role), self.student.conditioning(prompts)
        if self.cfg.method.rollout == "data":
            x0 = batch["latents"].to(self.device, torch.float32, non_blocking=True)
            noise = streams.randn("noise", *x0.shape[1:])
            x = self.student.add_noise(x0, noise, level(x0, self.sigmas[exit_rung]))
            return self.student.predict_x0(x, level(x, self.sigmas[exit_rung]), cond)
        with self.student.gathered():
            x = self.simulate(streams, self.latent_shape(batch), cond, exit_rung)
            return self.student.predict_x0(x, level(x, self.sigmas[exit_rung]), cond)

    def masked_frames(self, step: int, role: str) -> int:
        """Frames at the start of what is scored that get no gradient."""
        return 0

    @torch.no_grad()
    def simulate(self, streams: SampleStreams, shape: torch.Size, cond: Conditioning, exit_rung: int) -> Tensor:
        """Backward simulation: what the student's own sampler has at `exit_rung`, from noise."""

        def velocity_fn(x: Tensor, sigma: Tensor) -> Tensor:
            return self.student.predict_velocity(x, sigma, cond)

        noise = streams.randn("noise", *shape[1:])
        return renoise(
            velocity_fn, noise, self.sigmas[: exit_rung + 1], lambda k: streams.randn(f"noise_{k}", *shape[1:])
        )

    def exit_rung(self, step: int, role: str) -> int:
        """The rung at which this phase's rollouts leave the ladder: uniform, and the same everywhere, or ranks would wait for
        each other forever."""
        return fold(self.cfg.training.seed, step, role, "exit_rung") % len(self.sigmas)

    def exit_rungs(self, step: int, role: str) -> list[int]:
        """The same for every block of a streaming student; one here."""
        return [self.exit_rung(step, role)]

    # ------------------------------------------------------------------------------------------------- scores

    def noise_for_scores(self, generated: Tensor, streams: SampleStreams) -> tuple[Tensor, Tensor]:
        """sigma `[B, T]`, one level a sample, and the noised videos that teacher and critic are asked about."""
        method = self.cfg.method
        sigma = flow_matching.shift_sigma(streams.rand("score_sigma", 1), self.cfg.schedule.shift)
        sigma = sigma.clamp(method.min_score_timestep / NUM_TIMESTEPS, method.max_score_timestep / NUM_TIMESTEPS)
        sigma = sigma.expand(-1, generated.shape[1])
        return sigma, flow_matching.add_noise(generated, streams.randn("score_noise", *generated.shape[1:]), sigma)

    def teacher_x0(self, noisy: Tensor, sigma: Tensor, prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(guided, conditional) clean videos of the teacher. There is no unconditional pass at guidance 1."""
        scale, cond = self.cfg.method.teacher_guidance_scale, self.teacher.conditioning(prompts)
        if scale == 1:
            conditional = self.teacher.predict_x0(noisy, sigma, cond)
            return conditional, conditional
        uncond = self.teacher.conditioning([self.uncond_embeds] * len(prompts))
        if self.cfg.method.batched_guidance:
            twice = noisy.repeat(2, 1, 1, 1, 1), sigma.repeat(2, 1)
            conditional, unconditional = self.teacher.predict_x0(*twice, cond.and_then(uncond)).chunk(2)
        else:
            conditional = self.teacher.predict_x0(noisy, sigma, cond)
            unconditional = self.teacher.predict_x0(noisy, sigma, uncond)
        return guide(conditional, unconditional, scale), conditional

    # ------------------------------------------------------------------------------------------------- watching

    def rollout_metrics(self, generated: Tensor, step: int) -> dict[str, Tensor]:
        """The share of each exit rung of late and, of finished videos, mean and variance of the latents and their motion."""
        recent = range(max(1, step - HISTOGRAM_STEPS + 1), step + 1)
        drawn = [rung for s in recent for rung in self.exit_rungs(s, "critic")]
        metrics = {
            f"exit_rung/{timestep:g}": torch.tensor(drawn.count(rung) / len(drawn))
            for rung, timestep in enumerate(self.cfg.method.denoising_steps)
        }
        if self.is_finished(step, "critic"):
            metrics |= {"rollout/latent_mean": generated.mean(), "rollout/latent_variance": generated.var()}
            if generated.shape[1] > 1:
                metrics["rollout/motion_energy"] = motion_energy(generated)
        return metrics

    def is_finished(self, step: int, role: str) -> bool:
        """Whether this phase's rollouts go down to the last rung; the videos of earlier exits are blurred."""
        return min(self.exit_rungs(step, role)) == len(self.sigmas) - 1

    def warnings(self, values: dict[str, float]) -> list[str]:
        return self.watch.read(values)

    def checkpoint_state(self) -> dict[str, Stateful]:
        return super().checkpoint_state() | {"identity.teacher": Identity("models.teacher", self.teacher.identity)}
