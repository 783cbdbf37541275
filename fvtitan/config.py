"""The configuration of a run: one dataclass per TOML section; TOML file < command line; nothing unknown, nothing ignored.

`python -m fvtitan.config FILE [--section.key value ...]` prints the result, `python -m fvtitan.config --reference` every
key with its meaning (docs/config.md).
"""

from __future__ import annotations

import dataclasses
import io
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli
import tomli_w

from fvtitan.components.ema import EMAConfig
from fvtitan.components.lora import LoRAConfig
from fvtitan.components.lr_scheduler import LRSchedulerConfig
from fvtitan.components.optimizer import OptimizerConfig
from fvtitan.components.resume import flattened
from fvtitan.distributed.sequence_parallel import divisors
from fvtitan.distributed.utils import CommConfig, world_size_from_environment
from fvtitan.errors import UserError, cli, did_you_mean, nearest_multiples, redacted
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.methods import METHODS
from fvtitan.methods.base import MethodConfig
from fvtitan.models import MODELS, families, is_causal
from fvtitan.models.blocks import CausalConfig
from fvtitan.reference import reference
from fvtitan.strict import check_numbers, dotted, parse_dataclass, shown


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class JobSection:
    """[job]"""

    config_file: str = ""
    """The TOML file of this run."""
    description: str = ""
    """One line about the run, printed at the start."""
    dump_folder: str = "outputs/run"
    """Everything the run writes goes here; a run found here is resumed."""


@dataclass
class OptimizerOverrides:
    """[models.<role>.optimizer]: keys that differ from [optimizer] for this role."""

    lr: float | None = None
    """Learning rate of this role."""
    betas: tuple[float, float] | None = None
    """Moment decay rates of this role."""
    eps: float | None = None
    """Epsilon of this role."""
    weight_decay: float | None = None
    """Weight decay of this role."""


@dataclass
class LRSchedulerOverrides:
    """[models.<role>.lr_scheduler]: keys that differ from [lr_scheduler] for this role."""

    warmup_steps: int | None = None
    """Warm-up updates of this role."""
    decay_type: Literal["constant", "linear", "cosine"] | None = None
    """Decay of this role."""
    decay_ratio: float | None = None
    """Decaying share of this role's updates."""
    min_lr_factor: float | None = None
    """Final factor of this role."""


@dataclass
class ParallelismOverrides:
    """[models.<role>.parallelism]: keys that differ from [parallelism] for this role."""

    data_parallel_shard_degree: int | None = None
    """Ranks over which this role is sharded (times context_parallel_degree); the rest hold copies. A large frozen teacher may
    be sharded over all ranks, a small student within a node."""
    fsdp_reshard_after_forward: bool | None = None
    """Whether this role frees its gathered blocks."""


@dataclass
class RoleConfig:
    """[models.<role>]: one network of the run. Roles: student, and what the method asks for (teacher, critic)."""

    name: Literal[tuple(MODELS)] = "wan"
    """wan: every frame sees all frames. wan_causal: the same network and weights, seeing time in blocks."""
    flavor: str = ""
    """Sizes by name: tiny, 1.3B, 14B. Empty: the sizes of `init_from`."""
    init_from: str = ""
    """Initial weights: a folder in diffusers or Wan's original layout, a hub id, "tiny-wan" (the shipped one), a .safetensors
    file of either's names, a .pt of Self-Forcing or CausVid, or the checkpoint of a run, `.../checkpoint/step-<N>`. Empty:
    random."""
    init_role: str = "student"
    """init_from a checkpoint: which of its roles."""
    init_weights: Literal["auto", "ema", "raw"] = "auto"
    """init_from a checkpoint or .pt: the role's moving average, or its own weights; auto: the average where there is one."""
    trainable: bool = True
    """Whether this role is trained."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """In which frozen weights, a role's or those under its adapter, lie in memory and are computed; auto:
    training.mixed_precision_param. Trained weights are float32."""
    share_base_with: str = ""
    """With lora: the frozen role (teacher) on whose network this one is an adapter; it has none of its own. Empty: it has."""
    cpu_offload: bool = False
    """Frozen roles: the weights lie in the CPU's memory, and each block's are copied to the GPU when it runs. For teachers that
    would not fit; slower."""
    frames_per_block: int = 0
    """wan_causal: latent frames of a block (Self-Forcing: 3)."""
    independent_first_frame: bool = False
    """wan_causal: the first block is one latent frame."""
    local_attn_frames: int = -1
    """wan_causal: latent frames that a block sees, measured from its end, its own included; -1: all."""
    sink_frames: int = 0
    """wan_causal: first latent frames of the video that every block sees, beyond the window; in videos longer than in
    training, directly before it."""
    attention_backend: Literal["sdpa", "flex"] = "sdpa"
    """wan_causal, whole videos: sdpa makes one call a block, the fastest where it was measured (docs/performance.md, B6); flex
    is FlexAttention (no backward on a CPU)."""
    optimizer: OptimizerOverrides = field(default_factory=OptimizerOverrides)
    lr_scheduler: LRSchedulerOverrides = field(default_factory=LRSchedulerOverrides)
    parallelism: ParallelismOverrides = field(default_factory=ParallelismOverrides)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def check(self, role: str) -> None:
        self.lora.check(f"models.{role}.lora")
        _require(
            not self.lora.rank or self.trainable,
            f"models.{role}.lora.rank = {self.lora.rank} has no effect with trainable = false: remove one of them",
        )
        if self.share_base_with:
            self._check_sharing(role)
        else:
            _require(
                bool(self.flavor or self.init_from),
                f"models.{role}: give flavor (tiny, 1.3B, 14B), init_from (a folder or hub id), or both",
            )
            _require(
                not self.lora.rank or bool(self.init_from),
                f"models.{role}.lora.rank = {self.lora.rank}: an adapter needs weights to lie on; give init_from, or "
                "share_base_with",
            )
        _require(
            not self.trainable or bool(self.lora.rank) or self.dtype == "auto",
            f"models.{role}.dtype = {self.dtype!r}: the weights of a trained role are float32, computed in "
            "training.mixed_precision_param; remove it",
        )
        _require(
            not self.trainable or not self.cpu_offload,
            f"models.{role}.cpu_offload = true: only the weights of frozen roles can lie on the CPU; remove it",
        )
        causal_keys = ("frames_per_block", "independent_first_frame", "local_attn_frames", "sink_frames")
        if not self.is_causal:
            for key in (*causal_keys, "attention_backend"):
                _require(
                    getattr(self, key) == getattr(RoleConfig, key),
                    f'models.{role}.{key} = {getattr(self, key)!r} has no effect with name = "{self.name}": remove it, or '
                    'use name = "wan_causal"',
                )
            return
        _require(
            self.frames_per_block >= 1,
            f"models.{role}.frames_per_block = {self.frames_per_block}: wan_causal needs >= 1 (Self-Forcing uses 3)",
        )
        _require(
            self.local_attn_frames == -1 or self.local_attn_frames >= self.frames_per_block,
            f"models.{role}.local_attn_frames = {self.local_attn_frames}: must be >= frames_per_block "
            f"({self.frames_per_block}), or -1 for all frames",
        )
        _require(
            self.sink_frames == 0 or (self.sink_frames > 0 and self.local_attn_frames > 0),
            f"models.{role}.sink_frames = {self.sink_frames}: must be >= 0, and needs local_attn_frames",
        )

    @property
    def is_causal(self) -> bool:
        """Whether this role sees time in blocks."""
        return is_causal(self.name)

    def _check_sharing(self, role: str) -> None:
        where = f"models.{role}.share_base_with = {self.share_base_with!r}"
        _require(bool(self.lora.rank), f"{where}: only an adapter can share a network; set models.{role}.lora.rank")
        for key in ("flavor", "init_from", "init_role", "init_weights", "dtype", "cpu_offload"):
            _require(
                getattr(self, key) == getattr(RoleConfig, key),
                f"models.{role}.{key} = {getattr(self, key)!r} has no effect: the network is that of "
                f"{self.share_base_with!r}; give it there, or remove share_base_with",
            )
        _require(
            self.parallelism == ParallelismOverrides(),
            f"models.{role}.parallelism has no effect: the network is that of {self.share_base_with!r}; give it there",
        )

    def causal(self) -> CausalConfig:
        """How a `wan_causal` role sees time."""
        return CausalConfig(
            self.frames_per_block, self.independent_first_frame, self.local_attn_frames, self.sink_frames
        )


@dataclass
class DataSection:
    """[data]"""

    path: str = "data/cache"
    """The latent cache, made by `python -m fvtitan.preprocess`."""
    pipeline: str = "tiny-wan"
    """Text encoder and VAE: a folder in diffusers layout, a hub id, or "tiny-wan". Validation encodes prompts and decodes
    videos with them; training itself reads only the cache."""
    num_frames: int = 33
    """Frames of a clip, 4n + 1. Where the cache holds several sizes: of that which validation samples, and so below."""
    height: int = 64
    """Height of a clip in pixels, a multiple of 16."""
    width: int = 64
    """Width of a clip in pixels, a multiple of 16."""
    fps: int = 16
    """Frame rate of the clips; Wan works at 16."""
    num_workers: int = 0
    """Loader processes per rank."""
    caption_dropout: float = 0.1
    """Probability that a caption is replaced by `uncond_prompt`, drawn anew in every epoch; guidance needs it."""
    uncond_prompt: Literal["empty", "negative"] = "empty"
    """The prompt of the unconditional branch, in training (caption dropout) and sampling alike."""
    moving_shapes_clips: int = 0
    """When `path` does not exist: render this many captioned clips of moving shapes and preprocess them; only their captions
    when the method trains without videos. 0: never."""

    def latent_size(self) -> tuple[int, int, int]:
        """(T, H, W) of a clip's latents: Wan's VAE makes one frame of the first, then one of every 4, and 1/8 of each side."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8

    def check(self) -> None:
        _require(
            self.num_frames >= 1 and self.num_frames % 4 == 1,
            f"data.num_frames = {self.num_frames}: must be 4n + 1; nearest: {nearest_multiples(self.num_frames, 4, 1)}",
        )
        for key in ("height", "width"):
            value = getattr(self, key)
            _require(
                value >= 16 and value % 16 == 0,
                f"data.{key} = {value}: must be a multiple of 16; nearest: {nearest_multiples(value, 16)}",
            )
        _require(self.fps >= 1, f"data.fps = {self.fps}: must be >= 1")
        _require(self.num_workers >= 0, f"data.num_workers = {self.num_workers}: must be >= 0")
        _require(0 <= self.caption_dropout <= 1, f"data.caption_dropout = {self.caption_dropout}: must be in [0, 1]")
        _require(
            self.moving_shapes_clips >= 0,
            f"data.moving_shapes_clips = {self.moving_shapes_clips}: must be >= 0 (0: off)",
        )


@dataclass
class TrainingSection:
    """[training]"""

    steps: int = 1000
    """Training steps in all."""
    local_batch_size: int = 1
    """Clips per data rank (a rank, or the ranks that share a sequence) and forward."""
    global_batch_size: int = -1
    """Clips per optimizer step over all ranks; gradients are accumulated to reach it. -1: local_batch_size x data ranks."""
    max_norm: float = 1.0
    """Gradients are clipped to this global L2 norm."""
    nonfinite: Literal["halt", "skip"] = "halt"
    """A loss or gradient norm that is NaN or infinite on any rank updates nothing anywhere. halt: the run ends. skip: it goes
    on without this update of this role, whose learning rate schedule counts updates. Both name the samples."""
    max_nonfinite_skips: int = 10
    """skip: how many updates may be skipped in the whole run, over all roles and resumes; one more ends it."""
    seed: int = 0
    """Seed of every random stream of the run."""
    deterministic: bool = False
    """Only deterministic kernels, slower on a GPU."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of parameters and matrix products in forward and backward; master weights are float32."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are reduced over ranks."""
    gc_freq: int = 50
    """Python's garbage collector runs every so many steps, on all ranks together."""

    def check(self) -> None:
        _require(self.steps >= 1, f"training.steps = {self.steps}: must be >= 1")
        _require(self.local_batch_size >= 1, f"training.local_batch_size = {self.local_batch_size}: must be >= 1")
        _require(
            self.global_batch_size == -1 or self.global_batch_size >= 1,
            f"training.global_batch_size = {self.global_batch_size}: must be >= 1, or -1 for local_batch_size x data "
            "ranks",
        )
        _require(self.max_norm > 0, f"training.max_norm = {self.max_norm}: must be > 0")
        _require(
            self.max_nonfinite_skips >= 1,
            f'training.max_nonfinite_skips = {self.max_nonfinite_skips}: must be >= 1; training.nonfinite = "halt" skips none',
        )
        _require(
            self.nonfinite == "skip" or self.max_nonfinite_skips == TrainingSection.max_nonfinite_skips,
            f"training.max_nonfinite_skips = {self.max_nonfinite_skips} has no effect with training.nonfinite = "
            f'{self.nonfinite!r}: remove it, or use "skip"',
        )
        _require(self.seed >= 0, f"training.seed = {self.seed}: must be >= 0")
        _require(self.gc_freq >= 1, f"training.gc_freq = {self.gc_freq}: must be >= 1")


@dataclass
class ParallelismSection:
    """[parallelism]"""

    data_parallel_replicate_degree: int = 1
    """Groups of ranks that each hold a whole copy of the model (HSDP when > 1)."""
    data_parallel_shard_degree: int = -1
    """Ranks over which the model is sharded (FSDP2), times context_parallel_degree. -1: all that are left."""
    context_parallel_degree: int = 1
    """Ranks that share the tokens of one sequence (Ulysses); must divide the heads of every role. Costs communication: for
    sequences that do not fit one GPU, or more GPUs than samples."""
    fsdp_reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward; false gathers less and holds more memory."""
    defer_grad_sync: bool = False
    """Reduce gradients only in the last micro-batch of a step: less traffic, 4 more bytes a parameter on every rank."""

    def check(self, section: str) -> None:
        for key in ("data_parallel_replicate_degree", "data_parallel_shard_degree", "context_parallel_degree"):
            value, rest = getattr(self, key), key == "data_parallel_shard_degree"
            _require(
                value >= 1 or (rest and value == -1),
                f"{section}.{key} = {value}: must be >= 1{', or -1 for the rest' if rest else ''}",
            )


@dataclass
class ActivationCheckpointSection:
    """[activation_checkpoint]"""

    mode: Literal["none", "selective", "full"] = "none"
    """none keeps all activations. full keeps one tensor a block, its input, and recomputes the rest in backward. selective
    keeps the outputs of its two attentions too, the costly part of a long video's block: three tensors; and what ranks that
    share a sequence have exchanged. On a GPU selective needs compile.enable to be the faster one."""


@dataclass
class CompileSection:
    """[compile]"""

    enable: bool = False
    """Compile each transformer block in place with torch.compile."""
    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """inductor makes fast kernels; aot_eager and eager find out which part of the compiler is at fault."""

    def check(self) -> None:
        _require(
            self.enable or self.backend == "inductor",
            f"compile.backend = {self.backend!r} has no effect with compile.enable = false: remove it, or enable",
        )


@dataclass
class CheckpointSection:
    """[checkpoint]"""

    enable: bool = True
    """Save checkpoints, and resume from the latest one in the dump folder."""
    interval: int = 500
    """Save every so many steps, and after the last."""
    keep_latest_k: int = 2
    """Keep this many that were saved or read without a fault; 0 keeps all. A file `keep` in a checkpoint keeps it too."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async writes in the background while training goes on."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """A save that fails (a full disk) ends the run, with status 74 when the disk is full; or the run says so and goes on to
    the next one. The last save of a run must succeed."""
    load_step: int = -1
    """Resume from this step; -1: the latest."""
    fallback: bool = False
    """When the latest checkpoint turns out damaged: go on from the newest older one that is whole, and keep the damaged."""
    initial_load_path: str = ""
    """When the dump folder holds no checkpoint: start from this checkpoint folder (`.../checkpoint/step-<N>`)."""
    require_resume: bool = False
    """Fail when there is no checkpoint to resume from."""
    allow_changed: tuple[str, ...] = ()
    """Keys that may differ from those the checkpoint was made with, such as optimizer.lr. Keys of execution always may."""

    def check(self) -> None:
        _require(self.interval >= 1, f"checkpoint.interval = {self.interval}: must be >= 1")
        _require(
            self.keep_latest_k == 0 or self.keep_latest_k >= 2,
            f"checkpoint.keep_latest_k = {self.keep_latest_k}: must be 0 (all) or >= 2, so that a good one always stays",
        )
        _require(self.load_step >= -1, f"checkpoint.load_step = {self.load_step}: must be >= 0, or -1 for the latest")
        _require(
            not self.fallback or self.load_step == -1,
            f"checkpoint.fallback = true has no effect with checkpoint.load_step = {self.load_step}: remove one of them",
        )
        unused = ("require_resume", "initial_load_path", "fallback")
        if not self.enable:
            given = [key for key in unused if getattr(self, key)]
            given += ["load_step"] if self.load_step != -1 else []
            given += ["on_failed_save"] if self.on_failed_save != "stop" else []
            _require(not given, f"checkpoint.enable = false: {', '.join(given)} have no effect; remove them")


@dataclass
class ValidationSection:
    """[validation]: sample videos from fixed noise, write them, judge them."""

    enable: bool = True
    """Validate."""
    interval: int = 500
    """Validate every so many steps, and after the last."""
    prompts: str = "moving-shapes"
    """Prompts: a text file with one a line, or "moving-shapes" (the captions held out of every training set)."""
    num_prompts: int = 8
    """Videos per validation; prompts are repeated with new noise when there are fewer."""
    num_prompts_last: int = 0
    """Videos in the validation after the last step; 0: as many as in the others."""
    sampling_steps: int = 50
    """Sampler steps (finetune: Euler steps)."""
    guidance_scale: float = 5.0
    """u + g (c - u); 1 samples without guidance. The other convention, c + g' (c - u), is g = g' + 1."""
    judge: bool = False
    """Measure colour, shape and direction of the sampled moving shapes against their captions."""
    heldout_path: str = ""
    """Latent cache of held-out clips for `validation/loss`; empty: none. With data.moving_shapes_clips it is rendered."""
    heldout_clips: int = 48
    """Clips of it that are used."""

    def check(self) -> None:
        for key in ("interval", "num_prompts", "sampling_steps", "heldout_clips"):
            _require(getattr(self, key) >= 1, f"validation.{key} = {getattr(self, key)}: must be >= 1")
        _require(self.num_prompts_last >= 0, f"validation.num_prompts_last = {self.num_prompts_last}: must be >= 0")
        _require(self.guidance_scale >= 0, f"validation.guidance_scale = {self.guidance_scale}: must be >= 0")
        _require(
            not self.judge or self.prompts == "moving-shapes",
            f'validation.judge = true needs validation.prompts = "moving-shapes", not {self.prompts!r}',
        )


@dataclass
class MetricsSection:
    """[metrics]"""

    log_freq: int = 10
    """Log every so many steps, and the first and the last."""
    enable_tensorboard: bool = True
    """Write TensorBoard events into `<dump_folder>/tensorboard`."""
    enable_wandb: bool = False
    """Log to Weights & Biases too (pip install wandb; the key comes from the environment)."""
    peak_tflops: float = 0.0
    """TFLOP/s of a device that perf/mfu and perf/hfu are shares of; 0: by the GPU's name, dense bfloat16. On a device that is
    not known there are none."""

    def check(self) -> None:
        _require(self.log_freq >= 1, f"metrics.log_freq = {self.log_freq}: must be >= 1")
        _require(
            self.peak_tflops >= 0,
            f"metrics.peak_tflops = {self.peak_tflops}: must be > 0, or 0 to go by the GPU's name",
        )


@dataclass
class JobConfig:
    """A whole run."""

    job: JobSection = field(default_factory=JobSection)
    models: dict[str, RoleConfig] = field(default_factory=dict)
    method: MethodConfig = field(default_factory=METHODS["finetune"].Config)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallelism: ParallelismSection = field(default_factory=ParallelismSection)
    activation_checkpoint: ActivationCheckpointSection = field(default_factory=ActivationCheckpointSection)
    compile: CompileSection = field(default_factory=CompileSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    comm: CommConfig = field(default_factory=CommConfig)

    def with_latent_size(self, frames: int, height: int, width: int) -> JobConfig:
        """The same with clips of such latents."""
        size = {"num_frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width}
        return dataclasses.replace(self, data=dataclasses.replace(self.data, **size))

    def role_optimizer(self, role: str) -> OptimizerConfig:
        """[optimizer] with this role's overrides."""
        return _overlay(self.optimizer, self.models[role].optimizer)

    def role_dtypes(self, role: str) -> tuple[str, str]:
        """(of the weights in memory, of the computation). Under an adapter, of what it lies on."""
        model, compute = self.models[self.models[role].share_base_with or role], self.training.mixed_precision_param
        if model.trainable and not model.lora.rank:
            return "float32", compute
        dtype = compute if model.dtype == "auto" else model.dtype
        return dtype, dtype

    def adapters_on(self, role: str) -> list[str]:
        """The roles whose adapters lie on this role's network: its own, or those that share it."""
        return [
            name for name, model in self.models.items() if model.lora.rank and (model.share_base_with or name) == role
        ]

    def role_lr_scheduler(self, role: str) -> LRSchedulerConfig:
        """[lr_scheduler] with this role's overrides."""
        return _overlay(self.lr_scheduler, self.models[role].lr_scheduler)

    def check(self) -> None:
        """Everything that can be known before any work. Raises `UserError` at the first problem."""
        check_numbers(dataclasses.asdict(self))
        _check_redacted(dataclasses.asdict(self))
        for section in (
            "schedule",
            "data",
            "training",
            "ema",
            "compile",
            "checkpoint",
            "validation",
            "metrics",
            "comm",
        ):
            getattr(self, section).check()
        self.parallelism.check("parallelism")
        method = METHODS[self.method.name]
        roles = (*method.roles, *method.optional_roles)
        for role, model in self.models.items():
            _require(
                role in roles,
                f"[models.{dotted('', role)}] is not a role of {self.method.name!r}.{did_you_mean(role, roles)}",
            )
            model.check(role)
            self.role_optimizer(role).check(f"models.{role}.optimizer")
            self.role_lr_scheduler(role).check(f"models.{role}.lr_scheduler")
            self.role_parallelism(role).check(f"models.{role}.parallelism")
            _require(
                not model.cpu_offload or self.role_parallelism(role).fsdp_reshard_after_forward,
                f"models.{role}.cpu_offload = true has no effect with fsdp_reshard_after_forward = false, which leaves the "
                f"gathered blocks on the GPU: remove it, or set models.{role}.parallelism.fsdp_reshard_after_forward = true",
            )
        for role, model in self.models.items():
            if model.share_base_with:
                self._check_base(role, model.share_base_with)
        for role in method.roles:
            _require(role in self.models, f"method {self.method.name!r} needs the role {role!r}: add [models.{role}]")
        _require(
            self.models["student"].is_causal == method.causal_student,
            f"models.student.name = {self.models['student'].name!r}: method {self.method.name!r} trains a "
            f"{families(causal=method.causal_student)} student",
        )
        for role, model in self.models.items():
            if model.is_causal:
                self._check_blocks(role, model)
        self.method.check(self)

    def _check_base(self, role: str, name: str) -> None:
        where, base = f"models.{role}.share_base_with = {name!r}", self.models.get(name)
        _require(base is not None, f"{where}: there is no such role.{did_you_mean(name, self.models)}")
        _require(not base.share_base_with and name != role, f"{where}: has no network of its own")
        _require(not base.trainable, f"{where}: is trained; share the network of a frozen role")
        _require(bool(base.init_from), f"{where}: an adapter needs weights to lie on; give models.{name}.init_from")
        _require(
            not base.cpu_offload, f"models.{name}.cpu_offload = true: {role!r} trains an adapter on it; remove one"
        )

    def _check_blocks(self, role: str, model: RoleConfig) -> None:
        try:
            model.causal().blocks(self.data.latent_size()[0])
        except UserError as error:
            raise UserError(f"data.num_frames = {self.data.num_frames}, models.{role}: {error}") from None

    def check_world(self, world_size: int, *, training: bool = True) -> None:
        """Degrees and, for `training`, batch sizes against the number of processes."""
        sequence = self.parallelism.context_parallel_degree
        _require(
            world_size % sequence == 0,
            f"parallelism.context_parallel_degree = {sequence}: must divide the {world_size} processes; allowed: "
            f"{divisors(world_size)}",
        )
        ranks = world_size // sequence
        for role, model in self.models.items():
            replicate, shard = self.data_parallel_degrees(world_size, role)
            if model.parallelism.data_parallel_shard_degree is not None:
                key = f"models.{role}.parallelism.data_parallel_shard_degree = {shard}"
                _require(
                    replicate * shard == ranks, f"{key}: must divide the {ranks} data ranks; allowed: {divisors(ranks)}"
                )
            _require(
                replicate * shard == ranks,
                f"parallelism: data_parallel_replicate_degree {replicate} x data_parallel_shard_degree {shard} x "
                f"context_parallel_degree {sequence} is {replicate * shard * sequence}, but there are {world_size} processes",
            )
            MODELS[model.name].check(self, role)
        local, total = self.training.local_batch_size, self.global_batch_size(world_size)
        _require(
            not training or total % (local * ranks) == 0,
            f"training.global_batch_size = {total}: must be a multiple of local_batch_size x data ranks = {local} x "
            f"{ranks}; nearest: {nearest_multiples(total, local * ranks)}",
        )

    def role_parallelism(self, role: str) -> ParallelismSection:
        """[parallelism] with this role's overrides."""
        return _overlay(self.parallelism, self.models[role].parallelism)

    def data_parallel_degrees(self, world_size: int, role: str) -> tuple[int, int]:
        """(replicate, shard) of a role, with -1 resolved. A shard degree of its own leaves the other data ranks as copies."""
        ranks = world_size // self.parallelism.context_parallel_degree
        p = self.role_parallelism(role)
        shard, own = p.data_parallel_shard_degree, self.models[role].parallelism.data_parallel_shard_degree
        if own not in (None, -1):
            return max(1, ranks // own), own
        replicate = 1 if own == -1 else p.data_parallel_replicate_degree
        return replicate, max(1, ranks // replicate) if shard == -1 else shard

    def global_batch_size(self, world_size: int) -> int:
        """training.global_batch_size with -1 resolved."""
        total, ranks = self.training.global_batch_size, world_size // self.parallelism.context_parallel_degree
        return self.training.local_batch_size * ranks if total == -1 else total

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as TOML has it, without secrets of the environment."""
        return _plain(dataclasses.asdict(self))

    def to_toml(self) -> str:
        """The resolved configuration; reading it back gives the same one."""
        return tomli_w.dumps(self.to_dict())


def _overlay(base: Any, overrides: Any) -> Any:
    changes = {f.name: getattr(overrides, f.name) for f in dataclasses.fields(overrides)}
    return dataclasses.replace(base, **{key: value for key, value in changes.items() if value is not None})


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree


def _check_redacted(tree: dict[str, Any]) -> None:
    """Raise `UserError` for a value that `to_toml` would write with `***` in it: reading it back would give another."""
    for key, value in flattened(tree).items():
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and key != "job.description" and (written := redacted(text)) != text:
                raise UserError(
                    f"{key} = {written!r}: *** is the value of an environment variable whose name says key, token, secret or "
                    "password, which no file of a run may hold: use another value, or unset the variable"
                )


def read_toml(path: str | Path) -> JobConfig:
    """The configuration of a TOML file. Raises `UserError` naming the file, the key, the value and the nearest fix."""
    path = Path(path)
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise UserError(f"no such file: {path}.{did_you_mean(str(path), near) if near else ''}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, or too many digits
        raise UserError(f"{path}: not a TOML file: {error}") from None
    try:
        check_numbers(table)
        method_table = table.pop("method", {})
        name = method_table.get("name", "finetune") if isinstance(method_table, dict) else method_table
        if not isinstance(name, str) or name not in METHODS:
            raise UserError(f"method.name = {shown(name)} is not a method.{did_you_mean(str(name)[:200], METHODS)}")
        cfg = parse_dataclass(JobConfig, table, "")
        cfg.method = parse_dataclass(METHODS[name].Config, method_table, "method")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: tables or lists are nested too deeply") from None
    return cfg


def _split_config_file(argv: list[str]) -> tuple[str, list[str]]:
    """(value of --job.config_file or "", the other arguments)."""
    path, rest, arguments = "", [], iter(argv)
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag.replace("-", "_") == "__job.config_file":
            path = value or next(arguments, "")
            _require(bool(path), "--job.config_file needs a file")
        else:
            rest.append(argument)
    return path, rest


def _with_python_booleans(argv: list[str], cfg: JobConfig) -> list[str]:
    """TOML's true and false, as tyro wants them; the values of keys that hold text in `cfg` stay."""

    def is_text(key: str) -> bool:
        value: Any = cfg
        for part in key.lstrip("-").replace("-", "_").split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        return isinstance(value, str)

    python, words, key = {"true": "True", "false": "False"}, [], ""
    for argument in argv:
        flag, equals, value = argument.partition("=")
        key = flag if flag.startswith("--") else key
        if not is_text(key):
            argument = f"{flag}={python[value]}" if equals and value in python else python.get(argument, argument)
        words.append(argument)
    return words


def load_config(argv: list[str], *, training: bool = True, world_size: int | None = None) -> JobConfig:
    """Configuration from `--job.config_file FILE` and overrides `--section.key value` (or `=value`), checked; without
    `training`, batch sizes need not fit the number of processes, which is torchrun's unless `world_size` is given.

    Raises `UserError` for everything that is wrong in it.
    """
    import tyro

    path, overrides = _split_config_file(argv)
    cfg = read_toml(path) if path else JobConfig(models={"student": RoleConfig(flavor="tiny")})
    cfg.job.config_file = path
    if {"-h", "--help"} & set(overrides):
        whose = f"of {path}" if path else "of fine-tuning a student; give --job.config_file FILE for those of a recipe"
        about = f"The keys {whose}. docs/config.md has those of all methods and roles."
        config = (tyro.conf.FlagConversionOff,)
        tyro.cli(JobConfig, default=cfg, args=["--help"], description=about, config=config, use_underscores=True)
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            cfg = tyro.cli(
                JobConfig,
                default=cfg,
                args=_with_python_booleans(overrides, cfg),
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
                console_outputs=True,
            )
    except SystemExit:
        text = " ".join(line.strip(" │╭╮╰╯─") for line in message.getvalue().splitlines()).strip()
        raise UserError(f"command line: {' '.join(text.split())}") from None
    cfg.check()
    cfg.check_world(world_size or world_size_from_environment(), training=training)
    return cfg


def main() -> None:
    argv = sys.argv[1:]
    if argv == ["--reference"]:
        print(reference(JobConfig), end="")
        return
    if {"-h", "--help"} & set(argv):
        print(__doc__)
    if argv and not argv[0].startswith("-"):
        argv = ["--job.config_file", *argv]
    print(load_config(argv).to_toml(), end="")


if __name__ == "__main__":
    cli(main)
