"""What a training method is: it owns the roles, their optimizers and schedules, and says what one step of each role is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fvtitan import flow_matching
from fvtitan.components.lr_scheduler import build_lr_scheduler
from fvtitan.components.optimizer import build_optimizer, hyper_parameters
from fvtitan.components.rng import SampleStreams, fold
from fvtitan.components.stateful import Identity, ModelState, OptimizerState, RandomState, SchedulerState, Stateful
from fvtitan.data.latent_cache import LatentCache
from fvtitan.errors import UserError
from fvtitan.methods.passes import Pass
from fvtitan.models.base import Conditioning, ModelBase
from fvtitan.samplers import SamplerSpec

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


@dataclass
class MethodConfig:
    """[method]: the name selects the class, the other keys are the method's own."""

    name: str = ""
    """Training method."""

    def check(self, cfg: JobConfig) -> None:
        """Raise `UserError` for keys that contradict each other or the rest of the run."""


def check_num_frames_per_block(value: int | None, cfg: JobConfig) -> None:
    """The method's own `num_frames_per_block` is another name for the student's key, and must agree with it."""
    blocks = cfg.models["student"].frames_per_block
    if value not in (None, blocks):
        raise UserError(
            f"method.num_frames_per_block = {value}, but models.student.frames_per_block = {blocks}: give it there alone"
        )


def check_no_heldout_loss(cfg: JobConfig) -> None:
    """For few-step students."""
    if cfg.validation.enable and cfg.validation.heldout_path:
        raise UserError(
            f"validation.heldout_path = {cfg.validation.heldout_path!r}: a few-step student has no flow-matching loss that "
            "means something; remove it"
        )


class TrainingMethod(nn.Module, ABC):
    """Owns roles, optimizers and schedules. train.py calls, for each role in `phases(step)`, `single_train_step` once per
    micro-batch, then backward, clip, step."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    roles: ClassVar[tuple[str, ...]] = ("student",)
    """Those it needs."""
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Those it can use."""
    causal_student: ClassVar[bool] = False
    """Whether the student's family sees time in blocks."""

    def __init__(self, *, cfg: JobConfig, role_models: dict[str, ModelBase]):
        super().__init__()
        self.cfg = cfg
        self.role_models = role_models
        self.student = role_models["student"]
        self.device = self.student.device
        for role, model in role_models.items():
            if role != "student" and model.latent_channels != self.student.latent_channels:
                raise UserError(
                    f"models.{role}: its latents have {model.latent_channels} channels, the student's "
                    f"{self.student.latent_channels}: they do not share a VAE"
                )
        self.data = self.dataset()
        self.student.init_preprocessors(cfg, self.data)
        trained = {role: model for role, model in role_models.items() if model.trainable}
        self.role_modules: dict[str, nn.Module] = {role: model.transformer for role, model in trained.items()}
        self.optimizers = {
            role: build_optimizer(model.trained_parameters(), cfg.role_optimizer(role))
            for role, model in trained.items()
        }
        self.lr_schedulers = {
            role: build_lr_scheduler(optimizer, cfg.role_lr_scheduler(role), self.total_updates(role))
            for role, optimizer in self.optimizers.items()
        }

    def dataset(self) -> LatentCache:
        """What the loader reads."""
        return LatentCache(self.cfg.data.path, prompts_only=not self.needs_latents(self.cfg))

    @classmethod
    def needed_roles(cls, cfg: JobConfig) -> list[str]:
        """Which of the configured roles this run must build. All ranks call it."""
        return list(cfg.models)

    @classmethod
    def needs_latents(cls, cfg: JobConfig) -> bool:
        """Whether training reads videos; without, a cache of prompts is enough."""
        return True

    def latent_shape(self, batch: dict[str, Any]) -> torch.Size:
        """`[B, T, C, H, W]` of the videos that a batch trains on."""
        return batch["latents"].shape

    def clip_config(self, batch: dict[str, Any]) -> JobConfig:
        """The run's configuration with [data] of the size of a batch's clips: a cache may hold several."""
        if not self.needs_latents(self.cfg):
            return self.cfg
        frames, _, height, width = self.latent_shape(batch)[1:]
        return self.cfg.with_latent_size(frames, height, width)

    def description(self) -> str:
        """A line for the start of the run about what people get wrong; empty: nothing to say."""
        return ""

    def on_train_start(self) -> None:
        """Make the generator that the streams of `fvtitan.components.rng` are drawn with."""
        self.generator = torch.Generator(self.device).manual_seed(fold(self.cfg.training.seed, "generator"))

    def phases(self, step: int) -> tuple[str, ...]:
        """The roles trained in this step, in order."""
        return ("student",)

    def total_updates(self, role: str) -> int:
        """How often the run updates a role: the length of its learning-rate schedule."""
        return sum(role in self.phases(step) for step in range(1, self.cfg.training.steps + 1))

    @classmethod
    def passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int] | None = None) -> list[Pass]:
        """What a role's phase runs, for one sample: exactly where `rungs`, as `exit_rungs` draws them, are given; else on
        average. Empty: not known, then no FLOPs are reported."""
        return []

    def exit_rungs(self, step: int, role: str) -> list[int]:
        """The rungs at which the rollouts of a phase leave the student's ladder; empty: it has none."""
        return []

    @abstractmethod
    def single_train_step(self, batch: dict[str, Any], step: int, role: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-d) and metrics of one micro-batch of one role's phase: the mean over the micro-batch's samples."""

    def not_finite(self) -> str:
        """What is not finite in the phase that just ran, as this rank sees it ("the videos of the teacher"); empty: unknown.
        Phases keep what they see on the device, and it is read here alone: a host sync in every step would stall a GPU."""
        return ""

    def get_grad_clip_targets(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters, by name, whose gradients are clipped together after a phase."""
        return self.role_models[role].trained_parameters()

    @classmethod
    def sampler(cls, cfg: JobConfig) -> SamplerSpec:
        """How a student trained with `cfg` must be sampled: by Euler steps on the run's own schedule, with guidance."""
        validation = cfg.validation
        sigmas = flow_matching.euler_ladder(validation.sampling_steps, cfg.schedule.shift)
        return SamplerSpec(sigmas=tuple(sigmas), guidance_scale=validation.guidance_scale)

    def reference(self) -> tuple[ModelBase, SamplerSpec] | None:
        """A frozen model that validation samples beside the student, from the same noise, and how; None: there is none."""
        return None

    def warnings(self, values: dict[str, float]) -> list[str]:
        """What the logged values of a step (the job's means) say that the user should know."""
        return []

    def heldout_loss(self, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Per-sample loss `[B]` of fixed latents and noise at fixed noise levels `[B, T]`: the flow-matching error."""
        v = self.student.predict_velocity(flow_matching.add_noise(x0, noise, sigma), sigma, cond)
        return (v - flow_matching.velocity(x0, noise)).square().flatten(1).mean(1)

    def streams(self, batch: dict[str, Any], step: int, role: str) -> SampleStreams:
        """The random streams of a micro-batch's samples in one phase of one step."""
        return SampleStreams(self.generator, (self.cfg.training.seed, step, role), batch["positions"].tolist())

    def prompt_embeds(self, batch: dict[str, Any]) -> list[Tensor]:
        """The batch's prompts, some replaced by the unconditional one (caption dropout, anew on every pass)."""
        return [
            self.student.uncond_embeds if self._drops_caption(index, sample_pass) else prompt
            for prompt, index, sample_pass in zip(
                batch["prompt_embeds"],
                batch["sample_indices"].tolist(),
                batch["sample_passes"].tolist(),
                strict=True,
            )
        ]

    def conditioning(self, batch: dict[str, Any]) -> Conditioning:
        """The student's conditioning on `prompt_embeds`."""
        return self.student.conditioning(self.prompt_embeds(batch))

    def _drops_caption(self, index: int, sample_pass: int) -> bool:
        draw = fold(self.cfg.training.seed, "caption_dropout", sample_pass, index) / 2**32
        return draw < self.cfg.data.caption_dropout

    def checkpoint_state(self) -> dict[str, Stateful]:
        """Everything of the method that a checkpoint holds. Frozen weights are not saved: of a role with an adapter, that and
        the identity of what lies under it."""
        states: dict[str, Stateful] = {"random_state": RandomState(self.generator)}
        for role, module in self.role_modules.items():
            model = self.role_models[role]
            trained, adapter = model.trained_parameters(), model.adapter is not None
            states[f"roles.{role}.transformer"] = ModelState(module, trained if adapter else None)
            if adapter:
                states[f"identity.{role}"] = Identity(f"models.{role}", model.identity)
            states[f"optimizers.{role}"] = OptimizerState(trained, self.optimizers[role])
            states[f"schedulers.{role}"] = SchedulerState(self.lr_schedulers[role])
        return states

    def apply_hyper_parameters(self) -> None:
        """Give loaded optimizers and schedules the values of this run's configuration, at the position they are at."""
        for role, optimizer in self.optimizers.items():
            cfg, scheduler = self.cfg.role_optimizer(role), self.lr_schedulers[role]
            scheduler.base_lrs = [cfg.lr] * len(optimizer.param_groups)
            for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group |= hyper_parameters(group, cfg)
                group |= {"initial_lr": cfg.lr, "lr": cfg.lr * factor(scheduler.last_epoch)}
