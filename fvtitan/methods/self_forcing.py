"""Self-Forcing: a streaming few-step student, trained on its own rollouts (arXiv:2506.08009).

The student makes a video as it will at inference, block after block over a KV cache of its own clean blocks, and DMD2's losses
score the whole of it. The gradient of a block is that of its last forward: the cache is read detached, and the steps before
have no graph.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fvtitan import flow_matching
from fvtitan.components.rng import SampleStreams, fold
from fvtitan.errors import UserError
from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.methods.base import check_num_frames_per_block
from fvtitan.methods.dmd2 import DMD2Config, DMD2Method, distribution_matching_loss
from fvtitan.methods.passes import Pass
from fvtitan.models.base import CausalModelBase, Conditioning, ModelBase
from fvtitan.models.blocks import block_starts
from fvtitan.models.kv_cache import KVCache
from fvtitan.samplers import FreshNoise, SamplerSpec, level, solve

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


@dataclass
class SelfForcingConfig(DMD2Config):
    """[method] name = "self_forcing" """

    name: Literal["self_forcing"] = "self_forcing"
    """Training method."""
    student_sample_type: Literal["sde", "ode"] = "sde"
    """How the student goes from rung to rung: re-noised with fresh noise, or with the noise its prediction implies."""
    context_noise: float = 0.0
    """Timestep (0 - 1000) to which a finished block is noised when it enters the cache."""
    same_step_across_blocks: bool = True
    """All blocks of a rollout leave the ladder at the same rung; otherwise each at its own."""
    last_step_only: bool = False
    """Every block walks down the whole ladder."""
    start_gradient_frame: int = 0
    """Blocks that begin before this latent frame get no gradient."""
    gradient_mode: Literal["direct", "replay"] = "direct"
    """direct: one graph of all blocks. replay: roll without a graph, then run the last forward of each block again with one,
    and its backward: the activations of one block, whatever the length. Their gradients are equal."""
    max_num_frames: int = 0
    """Long rollouts: a random length up to this many video frames, of which the last data.num_frames are scored. 0: none."""
    reencode_first_frame: bool = False
    """Long rollouts: score the last data.num_frames as a video of their own, whose first latent frame is made anew from the
    picture it ends with (data.pipeline's VAE), as the authors do; off: it stays, as a latent of four pictures."""
    num_frames_per_block: int | None = None
    """The same as models.student.frames_per_block, for recipes that have it here; must agree with it."""

    def check(self, cfg: JobConfig) -> None:
        super().check(cfg)
        student = cfg.models["student"]
        if self.rollout != "simulate":
            raise UserError(f'method.rollout = {self.rollout!r}: self_forcing trains on its own rollouts, "simulate"')
        check_num_frames_per_block(self.num_frames_per_block, cfg)
        if not 0 <= self.context_noise < NUM_TIMESTEPS:
            raise UserError(f"method.context_noise = {self.context_noise}: a timestep, in [0, 1000)")
        last, _ = block_starts(student.causal().blocks(cfg.data.latent_size()[0]))[-1]
        if not 0 <= self.start_gradient_frame <= last:
            raise UserError(
                f"method.start_gradient_frame = {self.start_gradient_frame}: must be in [0, {last}], or no block of "
                f"data.num_frames = {cfg.data.num_frames} would be trained"
            )
        if self.last_step_only and not self.same_step_across_blocks:
            raise UserError("method.same_step_across_blocks = false has no effect with last_step_only = true")
        if self.max_num_frames:
            self._check_long(cfg)
        elif self.reencode_first_frame:
            raise UserError("method.reencode_first_frame has no effect without max_num_frames")

    def _check_long(self, cfg: JobConfig) -> None:
        student, where = cfg.models["student"], f"method.max_num_frames = {self.max_num_frames}"
        if self.max_num_frames % 4 != 1 or self.max_num_frames < cfg.data.num_frames:
            raise UserError(f"{where}: must be 4n + 1 and at least data.num_frames = {cfg.data.num_frames}")
        try:
            student.causal().blocks((self.max_num_frames - 1) // 4 + 1)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if self.max_num_frames > cfg.data.num_frames and len(student.causal().blocks(cfg.data.latent_size()[0])) < 2:
            raise UserError(
                f"{where}: the first scored block of a long rollout gets no gradient, so data.num_frames = "
                f"{cfg.data.num_frames} needs at least 2 blocks"
            )
        if self.max_num_frames > cfg.data.num_frames and student.local_attn_frames < 0:
            raise UserError(
                f"{where} is longer than data.num_frames = {cfg.data.num_frames}, but models.student.local_attn_frames = -1: "
                "a student that sees all frames was never trained on so many; give it a window"
            )


def rollout_lengths(cfg: JobConfig) -> range:
    """Latent frames that rollouts may have, equally likely."""
    frames, longest = cfg.data.latent_size()[0], (cfg.method.max_num_frames - 1) // 4 + 1
    return range(frames, max(longest, frames) + 1, cfg.models["student"].frames_per_block)


def masked_frames(cfg: JobConfig, length: int) -> int:
    """Frames at the start of the scored part of a rollout that get no gradient. The first latent frame of a video holds one
    picture, where that of a later part holds four: teacher and critic, who have only seen videos from the start, misjudge
    it, and its block with it."""
    start = length - cfg.data.latent_size()[0]
    if not start:
        return 0
    return next(end for _, end in block_starts(cfg.models["student"].causal().blocks(length)) if end > start) - start


def first_gradient_frame(cfg: JobConfig, length: int, masked: int) -> int:
    """Blocks of a rollout that begin before it have no graph."""
    return max(cfg.method.start_gradient_frame, length - cfg.data.latent_size()[0] + masked)


@dataclass(frozen=True)
class Exit:
    """The last forward of a block: what went in."""

    noisy: Tensor
    sigma: Tensor
    start: int


@dataclass(frozen=True)
class Rollout:
    """A video of the student `[B, T, C, H, W]`, and how its blocks came about."""

    video: Tensor
    exits: list[Exit]
    cond: Conditioning
    cache: KVCache


class SelfForcingMethod(DMD2Method):
    """DMD2 on the student's own streaming rollouts."""

    Config = SelfForcingConfig
    causal_student: ClassVar[bool] = True
    student: CausalModelBase

    def __init__(self, *, cfg: JobConfig, role_models: dict[str, ModelBase]):
        super().__init__(cfg=cfg, role_models=role_models)
        self.vae = None
        if cfg.method.reencode_first_frame:
            from fvtitan.models.encoders import VideoVAE

            self.vae = VideoVAE(cfg.data.pipeline, device=self.device)

    @classmethod
    def sampler(cls, cfg: JobConfig) -> SamplerSpec:
        """As in training: streaming, on the student's own rungs, without guidance."""
        method = cfg.method
        return SamplerSpec(
            sigmas=method.ladder(cfg.schedule.shift),
            solver=method.student_sample_type,
            streaming=True,
            context_noise=method.context_noise / NUM_TIMESTEPS,
        )

    # ------------------------------------------------------------------------------------------------- passes

    @classmethod
    def possible_exits(cls, cfg: JobConfig) -> list[list[int]]:
        count, blocks = len(cfg.method.denoising_steps), cfg.models["student"].causal().blocks
        rungs = [count - 1] if cfg.method.last_step_only else range(count)
        return [[rung] * len(blocks(length)) for length in rollout_lengths(cfg) for rung in rungs]

    @classmethod
    def rollout_passes(cls, cfg: JobConfig, role: str, rungs: Sequence[int]) -> list[Pass]:
        """Every block walks to its exit and leaves there; all but the last are committed. Replayed, those with gradient
        leave twice."""
        causal = cfg.models["student"].causal()
        frames = next(length for length in rollout_lengths(cfg) if len(causal.blocks(length)) == len(rungs))
        first = frames if role == "critic" else first_gradient_frame(cfg, frames, masked_frames(cfg, frames))
        gradient = [float(start >= first) for start, _ in block_starts(causal.blocks(frames))]
        direct = cfg.method.gradient_mode == "direct"
        walked = [
            rung + (1.0 - with_graph if direct else 1.0) for rung, with_graph in zip(rungs, gradient, strict=True)
        ]
        without = (*(count + 1 for count in walked[:-1]), walked[-1])
        stream = functools.partial(Pass, "student", frames, attention="streaming")
        return [
            stream(without, texts=1.0 if any(without) else 0.0),  # the cache keeps the text
            stream(tuple(gradient), gradient=True, texts=sum(gradient)),
        ]

    # ------------------------------------------------------------------------------------------------- phases

    def student_step(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.cfg.method.gradient_mode == "direct":
            return super().student_step(batch, step)
        streams, prompts = self.streams(batch, step, "student"), self.prompt_embeds(batch)
        with torch.no_grad():
            rollout = self.roll(batch, prompts, streams, step, "student")
        window = self.scored(rollout.video)
        gradient, metrics = self.score(window, prompts, streams, step)
        skipped = self.masked_frames(step, "student")
        loss = distribution_matching_loss(window[:, skipped:], gradient[:, skipped:])
        slope = torch.zeros_like(rollout.video, dtype=gradient.dtype)
        slope[:, slope.shape[1] - window.shape[1] + skipped :] = gradient[:, skipped:] / gradient[:, skipped:].numel()
        return _Replayed.apply(loss.requires_grad_(), lambda scale: self.replay(rollout, scale * slope, step)), metrics

    def replay(self, rollout: Rollout, slope: Tensor, step: int) -> None:
        """The last forward of each block again, with gradient, and its backward: `slope` is the loss' derivative by the
        video. The cache still holds the rollout's clean blocks."""
        with self.student.gathered():
            for exit_ in rollout.exits:
                if exit_.start < self.first_gradient_frame(step, "student"):
                    continue
                with torch.enable_grad():
                    block = self.leave(exit_, rollout.cond, rollout.cache)
                block.backward(slope[:, exit_.start : exit_.start + block.shape[1]].to(block.dtype))

    # ------------------------------------------------------------------------------------------------- rollout

    def generate(
        self, batch: dict[str, Any], prompts: list[Tensor], streams: SampleStreams, step: int, role: str
    ) -> Tensor:
        return self.scored(self.roll(batch, prompts, streams, step, role).video)

    def roll(
        self, batch: dict[str, Any], prompts: list[Tensor], streams: SampleStreams, step: int, role: str
    ) -> Rollout:
        """One video, block after block. Where gradient is enabled, the last forward of each block has a graph."""
        shape = self.rollout_shape(batch, step, role)
        cond, cache = self.student.conditioning(prompts), self.student.new_cache(shape)
        whole = functools.cache(lambda rung: streams.randn(f"noise_{rung}" if rung else "noise", *shape[1:]))

        def noise_of(start: int, end: int, rung: int) -> Tensor:
            return whole(rung)[:, start:end]

        spans, first = block_starts(self.student.causal.blocks(shape[1])), self.first_gradient_frame(step, role)
        exits, blocks = [], []
        with self.student.gathered():
            for (start, end), rung in zip(spans, self.exit_rungs(step, role), strict=True):
                noise = functools.partial(noise_of, start, end)
                exits.append(self.walk(noise, cond, cache, start, rung))
                with torch.set_grad_enabled(torch.is_grad_enabled() and start >= first):
                    blocks.append(self.leave(exits[-1], cond, cache))
                if end < shape[1]:
                    self.commit(blocks[-1], noise, cond, cache, start)
        return Rollout(torch.cat(blocks, dim=1), exits, cond, cache)

    @torch.no_grad()
    def walk(self, noise: FreshNoise, cond: Conditioning, cache: KVCache, start: int, rung: int) -> Exit:
        """A block from noise down to `rung`."""

        def velocity_fn(x: Tensor, sigma: Tensor) -> Tensor:
            return self.student.predict_velocity_streaming(x, sigma, cond, cache, start)

        spec = SamplerSpec(self.sigmas[: rung + 1], solver=self.cfg.method.student_sample_type)
        x = solve(spec, velocity_fn, noise(0), noise)
        return Exit(x, level(x, self.sigmas[rung]), start)

    def leave(self, exit_: Exit, cond: Conditioning, cache: KVCache) -> Tensor:
        """The clean block `[B, t, C, H, W]` that the student sees at an exit."""
        velocity = self.student.predict_velocity_streaming(exit_.noisy, exit_.sigma, cond, cache, exit_.start)
        return flow_matching.velocity_to_x0(exit_.noisy, velocity, exit_.sigma)

    @torch.no_grad()
    def commit(self, block: Tensor, noise: FreshNoise, cond: Conditioning, cache: KVCache, start: int) -> None:
        """Write a finished block into the cache, without gradient."""
        noised = self.cfg.method.context_noise / NUM_TIMESTEPS
        block = block.detach()
        if noised:
            block = flow_matching.add_noise(block, noise(len(self.sigmas)), level(block, noised))
        self.student.commit(block, cond, cache, start, noised)

    # ------------------------------------------------------------------------------------------------- lengths

    def rollout_shape(self, batch: dict[str, Any], step: int, role: str) -> torch.Size:
        """`[B, T, C, H, W]`; T is random, and the same everywhere, when `max_num_frames` allows longer rollouts."""
        b, _, *rest = self.latent_shape(batch)
        return torch.Size((b, self._num_frames(step, role), *rest))

    def _num_frames(self, step: int, role: str) -> int:
        lengths = rollout_lengths(self.cfg)
        return lengths[fold(self.cfg.training.seed, step, role, "length") % len(lengths)]

    def scored(self, video: Tensor) -> Tensor:
        """The part of a rollout that teacher and critic see: its last frames, as many as a clip has."""
        frames = self.cfg.data.latent_size()[0]
        if self.vae is None or video.shape[1] == frames:
            return video[:, -frames:]
        rest = frames - 1
        with torch.no_grad():
            pixels = self.vae.decode(video[:, : video.shape[1] - rest].detach())
            first = self.vae.encode(pixels[:, -1:]).to(video.dtype)
        return torch.cat([first, video[:, video.shape[1] - rest :]], dim=1)

    def masked_frames(self, step: int, role: str) -> int:
        return masked_frames(self.cfg, self._num_frames(step, role))

    def first_gradient_frame(self, step: int, role: str) -> int:
        """Blocks that begin before it have no graph."""
        return first_gradient_frame(self.cfg, self._num_frames(step, role), self.masked_frames(step, role))

    def exit_rungs(self, step: int, role: str) -> list[int]:
        method, blocks = self.cfg.method, self.student.causal.blocks(self._num_frames(step, role))
        if method.last_step_only:
            return [len(self.sigmas) - 1] * len(blocks)
        if method.same_step_across_blocks:
            return [self.exit_rung(step, role)] * len(blocks)
        seed = self.cfg.training.seed
        return [fold(seed, step, role, "exit_rung", block) % len(self.sigmas) for block in range(len(blocks))]


class _Replayed(torch.autograd.Function):
    """A loss whose gradient is worked out by `run(scale)` when backward reaches it: of a GPU in a thread of autograd's, where
    the settings of torch.compile, which are context variables, would be others."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, run: Callable[[Tensor], None]) -> Tensor:
        ctx.run = functools.partial(contextvars.copy_context().run, run)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[None, None]:
        ctx.run(scale)
        return None, None
