"""Validation: a held-out loss that means something, sampled videos one can watch, and their judge.

Noise, clips and noise levels are fixed by the seed alone, so numbers are comparable over steps, ranks and resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor

from fvtitan import samplers
from fvtitan.components import faults
from fvtitan.components.ema import EMA
from fvtitan.components.files import write_atomic
from fvtitan.components.metrics import MetricLogger, jsonable
from fvtitan.components.rng import generator
from fvtitan.components.visualise import contact_sheet, video_name
from fvtitan.data.latent_cache import LatentCache
from fvtitan.distributed.mesh import data_ranks, leads_sequence
from fvtitan.distributed.utils import free_memory
from fvtitan.errors import UserError
from fvtitan.flow_matching import sample_sigma
from fvtitan.methods.base import TrainingMethod
from fvtitan.models.base import ModelBase
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.samplers import SamplerSpec

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

ENCODED_TOGETHER = 8
NUM_QUANTILES = 9
VALUES = "step-{}/values.json"
SHEET_ROWS = 16
SIDE_BY_SIDE_PROMPTS = 6


@dataclass
class _Sample:
    index: int
    prompt: str
    frames: Tensor  # uint8 [T, H, W, 3]


def read_prompts(source: str) -> list[str]:
    """Prompts of a text file, one a line, or the held-out captions of the moving shapes."""
    if source == "moving-shapes":
        from fvtitan.data.moving_shapes import held_out_combinations

        return [attributes.caption for attributes in held_out_combinations()]
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"validation.prompts = {source!r}: cannot read it: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"validation.prompts = {source!r}: the file has no prompts")
    return prompts


def fixed_noise(seed: int, indices: Sequence[int], shape: Sequence[int], rung: int = 0) -> Tensor:
    """The noise `[len(indices), *shape]` that validation gives to its videos number `indices`: what they start from (rung 0),
    or what they are re-noised with to a rung of the ladder."""
    names = [(seed, "validation", i, *([rung] if rung else [])) for i in indices]
    return torch.stack([torch.randn(shape, generator=generator("cpu", *name)) for name in names])


def sample_latents(
    model: ModelBase,
    spec: SamplerSpec,
    prompt_embeds: Sequence[Tensor],
    *,
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """Latents `[B, *shape]`, shape `(T, C, H, W)`, of the prompts, as `spec` says; all noise is that of videos `indices`."""
    cond = model.conditioning(prompt_embeds)
    uncond = model.unconditional(len(prompt_embeds)) if spec.guidance_scale != 1 else None

    def fresh(rung: int) -> Tensor:
        return fixed_noise(seed, indices, shape, rung).to(model.device)

    return samplers.sample(model, spec, fresh(0), cond, uncond, fresh)


def is_validated(dump_folder: Path, step: int) -> bool:
    """Whether the validation of a step is there, and whole."""
    return (dump_folder / "validation" / VALUES.format(step)).is_file()


def forget_validations(dump_folder: Path, after: int) -> None:
    """Those of later steps, which are trained again, count no more; their videos stay until they are made anew."""
    for path in (dump_folder / "validation").glob(VALUES.format("*")):
        if int(path.parent.name.removeprefix("step-")) > after:
            path.unlink()


class Validator:
    """Samples, writes, judges. Every rank takes part: forwards of a sharded model are collective."""

    def __init__(self, cfg: JobConfig, method: TrainingMethod, metrics: MetricLogger, device: torch.device):
        self.cfg = cfg
        self.method = method
        self.metrics = metrics
        self.device = device
        self.rank = dist.get_rank()
        self.data_rank, self.data_world = data_ranks(cfg)
        # The ranks of a sequence sample the same videos; one of them decodes and writes.
        self.writes = leads_sequence(cfg)
        self.folder = Path(cfg.job.dump_folder) / "validation"
        self.vae = VideoVAE(cfg.data.pipeline, device=device)
        videos = max(cfg.validation.num_prompts, cfg.validation.num_prompts_last)
        self.prompts = read_prompts(cfg.validation.prompts)[:videos]
        self.embeds = self._encode_prompts()
        self.heldout = LatentCache(cfg.validation.heldout_path) if cfg.validation.heldout_path else None
        latent_frames = (cfg.data.num_frames - 1) // self.vae.temporal_ratio + 1
        height, width = cfg.data.height // self.vae.spatial_ratio, cfg.data.width // self.vae.spatial_ratio
        self.latent_shape = (latent_frames, self.vae.vae.config.z_dim, height, width)
        self._reference: tuple[dict[str, float], list[_Sample]] | None = None  # sampled once: it does not change

    def _encode_prompts(self) -> list[Tensor]:
        """Embeddings of the prompts: rank 0 encodes once, then the text encoder leaves memory."""
        path = self.folder / "prompts.safetensors"
        if self.rank == 0:
            encoder, rows = TextEncoder(self.cfg.data.pipeline, device=self.device), []
            for start in range(0, len(self.prompts), ENCODED_TOGETHER):
                encoded = encoder.encode(self.prompts[start : start + ENCODED_TOGETHER])
                rows += [row.to("cpu", torch.bfloat16) for row in encoded]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save({f"{i:05d}": row for i, row in enumerate(rows)}))
            del encoder, encoded
            free_memory(self.device)
        dist.barrier()
        stored = load_file(path)
        return [stored[f"{i:05d}"] for i in range(len(self.prompts))]

    def run(self, step: int, ema: EMA | None, *, last: bool) -> None:
        """Validate the student, and its moving average when there is one; log and write everything under step `step`. A method
        with a reference (a teacher) gets a picture of all of them side by side, from the same noise."""
        faults.reach("validation", step)
        settings, student, spec = self.cfg.validation, self.method.student, self.method.sampler(self.cfg)
        num_videos = (last and settings.num_prompts_last) or settings.num_prompts
        reference = self.method.reference()
        if reference is not None and self._reference is None:
            model, how = reference
            self._reference = self._videos(model, how, step, settings.num_prompts, "teacher")
        student.transformer.eval()
        values = self._heldout_loss("") if self.heldout else {}
        scores, shown = self._videos(student, spec, step, num_videos, "student")
        values, columns = values | scores, {"student": shown}
        if ema is not None:
            with ema.swapped():
                values |= self._heldout_loss("_ema") if self.heldout else {}
                scores, shown = self._videos(student, spec, step, num_videos, "ema")
                values, columns = values | scores, columns | {"ema": shown}
        student.transformer.train()
        for model in self.method.role_models.values():
            model.release_cache()
        if self._reference is not None:
            values, columns = values | self._reference[0], columns | {"teacher": self._reference[1]}
        self.metrics.log(step, values)
        if self.rank == 0:
            folder = self.folder / f"step-{step}"
            if self._reference is not None:
                rows = zip(
                    *[samples[:SIDE_BY_SIDE_PROMPTS] for samples in columns.values()], strict=False
                )  # the fewest
                labelled = [
                    (f"{s.prompt}: {name}", s.frames) for row in rows for name, s in zip(columns, row, strict=True)
                ]
                contact_sheet(labelled, folder / "side_by_side.png")
            content = {name: jsonable(value) for name, value in values.items()}
            write_atomic(self.folder / VALUES.format(step), json.dumps(content, indent=1))  # last: see is_validated
            print(f"validation videos: {folder}", flush=True)

    @torch.no_grad()
    def _videos(
        self, model: ModelBase, spec: SamplerSpec, step: int, num_videos: int, name: str
    ) -> tuple[dict[str, float], list[_Sample]]:
        """Sample, write and judge under `name`. Returns the scores (on every rank) and the first videos (on rank 0 alone)."""
        suffix = "" if name == "student" else f"_{name}"
        folder = self.folder / f"step-{step}" / name
        samples = self._sample(model, spec, num_videos)
        judged = self._judge(samples) if self.cfg.validation.judge else []
        self._write(samples, folder)
        shown = [sample for sample in samples if sample.index < SHEET_ROWS]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (bool(shown), judged))
        rows = sorted(self._to_rank_zero(shown, [some for some, _ in gathered]), key=lambda s: s.index)
        if self.rank == 0:
            contact_sheet([(s.prompt, s.frames) for s in rows], folder / "contact_sheet.png")
            for sample in rows[:4]:
                tag = f"validation{suffix}/{sample.index}"
                self.metrics.add_video(tag, sample.frames, step, fps=self.cfg.data.fps)
                self.metrics.add_text(tag, sample.prompt, step)
        if not self.cfg.validation.judge:
            return {}, rows
        from fvtitan.data.moving_shapes import summarise

        everyone = sorted((item for _, judged in gathered for item in judged), key=lambda item: item[0])
        scores = summarise([judgement for _, judgement in everyone])
        return {f"judge{suffix}/{key}": value for key, value in scores.items()}, rows

    def _to_rank_zero(self, shown: list[_Sample], have: Sequence[bool]) -> list[_Sample]:
        """From the ranks that have some, one after another: gathered, every rank would hold room for all."""
        if self.rank and shown:
            dist.send_object_list([shown], dst=0)
        if self.rank:
            return []
        for source in [rank for rank, some in enumerate(have) if rank and some]:
            received: list[Any] = [None]
            dist.recv_object_list(received, src=source)
            shown = shown + received[0]
        return shown

    def _batches(self, count: int, shapes: Sequence[Sequence[int]] = ()) -> list[list[int]]:
        """This data rank's batches of 0 .. count-1, each of one of their `shapes`. All ranks get equally many (an empty one
        repeats item 0 for company)."""
        size = self.cfg.training.local_batch_size
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in range(count):
            groups.setdefault(tuple(shapes[i]) if shapes else (), []).append(i)
        batches = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
        rank, world = self.data_rank, self.data_world
        rounds = -(-len(batches) // world)
        return [batches[i] if i < len(batches) else [] for i in range(rank, rounds * world, world)]

    def _sample(self, model: ModelBase, spec: SamplerSpec, num_videos: int) -> list[_Sample]:
        seed, shape = self.cfg.training.seed, self.latent_shape
        samples = []
        for batch in self._batches(num_videos):
            indices = batch or [0]
            prompts = [self.embeds[i % len(self.embeds)] for i in indices]
            latents = sample_latents(model, spec, prompts, seed=seed, indices=indices, shape=shape)
            if not self.writes:
                continue
            for i, pixels in zip(batch, self.vae.decode(latents), strict=False):  # an empty batch ran for company only
                samples.append(_Sample(i, self.prompts[i % len(self.prompts)], to_uint8(pixels)))
        return samples

    def _write(self, samples: list[_Sample], folder: Path) -> None:
        from fvtitan.data.video import write_video

        folder.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            write_video(folder / video_name(sample.index, sample.prompt), sample.frames, fps=self.cfg.data.fps)

    def _judge(self, samples: list[_Sample]) -> list[tuple[int, Any]]:
        from fvtitan.data.moving_shapes import judge_video

        return [(sample.index, judge_video(sample.frames, sample.prompt)) for sample in samples]

    @torch.no_grad()
    def _heldout_loss(self, suffix: str) -> dict[str, float]:
        """Loss on fixed clips with fixed noise at the 9 mid-quantiles of the training distribution of sigma."""
        cache, method, seed = self.heldout, self.method, self.cfg.training.seed
        assert cache is not None
        count = min(self.cfg.validation.heldout_clips, len(cache))
        quantiles = (torch.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
        levels = sample_sigma(quantiles, self.cfg.schedule).tolist()
        losses = torch.zeros(count, NUM_QUANTILES, dtype=torch.float64)
        for batch in self._batches(count, [sample["shape"] for sample in cache.samples[:count]]):
            clips = [cache[i] for i in batch or [0]]
            x0 = torch.stack([clip["latents"] for clip in clips]).to(self.device, torch.float32)
            noise = torch.stack(
                [torch.randn(x0.shape[1:], generator=generator("cpu", seed, "heldout", i)) for i in batch or [0]]
            ).to(self.device)
            cond = method.student.conditioning([clip["prompt_embeds"] for clip in clips])
            for q, level in enumerate(levels):
                sigma = torch.full(x0.shape[:2], level, device=self.device)
                loss = method.heldout_loss(x0, noise, sigma, cond)
                losses[batch, q] = loss[: len(batch)].double().cpu()
        everywhere = (losses if self.writes else torch.zeros_like(losses)).to(self.device)
        dist.all_reduce(everywhere)  # every clip was filled in by one rank
        name = f"validation{suffix}/loss"
        by_level = {
            f"{name}_sigma_{level:.3f}": mean for level, mean in zip(levels, everywhere.mean(0).tolist(), strict=True)
        }
        return {name: float(everywhere.mean()), **by_level}


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels `[T, 3, H, W]` in [-1, 1] -> uint8 `[T, H, W, 3]` on the CPU."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
