"""Score models on moving shapes: sample held-out captions, judge the videos, print one table.

    python -m fvtitan.score                                             # tiny-wan at 50, 16 and 4 steps, and the VAE's ceiling
    python -m fvtitan.score --models tiny-wan outputs/tiny_dfsft/checkpoint/step-1500 --num-frames 33 105 --steps 50

A model is a pipeline in diffusers layout ("tiny-wan", a folder, a hub id), sampled by Euler steps, or a checkpoint of a run,
sampled as its own method says; of a checkpoint the moving average is taken where there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fvtitan.components.files import write_atomic
from fvtitan.components.validation import fixed_noise, sample_latents, to_uint8
from fvtitan.components.visualise import contact_sheet
from fvtitan.config import RoleConfig, read_toml
from fvtitan.data.moving_shapes import CHANCE, held_out_combinations, judge_video, render_clip, summarise
from fvtitan.errors import UserError, cli
from fvtitan.flow_matching import ScheduleConfig, euler_ladder
from fvtitan.methods import METHODS
from fvtitan.models import MODELS
from fvtitan.models.base import CausalModelBase, ModelBase
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.pipeline import TINY_WAN, pipeline_folder, pipeline_shift
from fvtitan.models.wan import weights
from fvtitan.models.wan.model import WanModel
from fvtitan.preprocess import WAN_NEGATIVE_PROMPT
from fvtitan.samplers import SamplerSpec, num_forwards

BATCH = 16
SHEET_ROWS = 12
COLUMNS = (*CHANCE, "area_drift", "speed_drift")


@dataclass
class Row:
    """One line of the table: what was sampled and how, and what the judge measured."""

    model: str
    steps: int
    num_frames: int
    forwards: int
    """Forwards of the network for one video; conditional and unconditional count as two."""
    seconds: float
    """Wall time a video, decoding included."""
    scores: dict[str, float]


def load_model(source: str, raw: bool = False) -> tuple[ModelBase, SamplerSpec | None, str]:
    """(model, its own sampler or None for a pipeline, "empty" or "negative": the unconditional prompt)."""
    folder = Path(source)
    if not (folder / "manifest.json").is_file():
        sizes, tensors = weights.read_pipeline(source)
        schedule = ScheduleConfig(shift=pipeline_shift(pipeline_folder(source, "transformer", "scheduler")))
        return WanModel.from_tensors(sizes, tensors, schedule, RoleConfig()), None, "empty"
    cfg = read_toml(folder / "config.toml")
    sizes, tensors = weights.read_checkpoint(folder, "student", raw=raw)
    model = MODELS[cfg.models["student"].name].from_tensors(sizes, tensors, cfg.schedule, cfg.models["student"])
    return model, METHODS[cfg.method.name].sampler(cfg), cfg.data.uncond_prompt


def score(
    name: str,
    model: ModelBase,
    spec: SamplerSpec,
    vae: VideoVAE,
    prompts: Sequence[str],
    prompt_embeds: Sequence[Tensor],
    *,
    num_frames: int,
    num_videos: int,
    seed: int = 0,
) -> tuple[Row, list[tuple[str, Tensor]]]:
    """Judge `num_videos` videos of 64 x 64; prompts are taken in turn, each time with new noise. Returns the row and the
    first videos, uint8 `[T, H, W, 3]` with their prompts."""
    shape = ((num_frames - 1) // vae.temporal_ratio + 1, vae.vae.config.z_dim, *[64 // vae.spatial_ratio] * 2)
    judged, shown, start = [], [], time.perf_counter()
    for first in range(0, num_videos, BATCH):
        indices = range(first, min(first + BATCH, num_videos))
        embeds = [prompt_embeds[i % len(prompts)] for i in indices]
        with torch.no_grad():
            latents = sample_latents(model, spec, embeds, fixed_noise(seed, indices, shape))
        for i, latent in zip(indices, latents, strict=True):
            frames = to_uint8(vae.decode(latent[None])[0])
            judged.append(judge_video(frames, prompts[i % len(prompts)]))
            shown += [(prompts[i % len(prompts)], frames)] if i < SHEET_ROWS else []
    seconds = (time.perf_counter() - start) / num_videos
    blocks = len(model.causal.blocks(shape[0])) if spec.streaming else 1
    steps, forwards = len(spec.sigmas) - 1, num_forwards(spec, blocks)
    return Row(name, steps, num_frames, forwards, seconds, summarise(judged)), shown


def vae_ceiling(vae: VideoVAE, *, num_frames: int, num_videos: int, seed: int = 0) -> Row:
    """What is left after encoding and decoding rendered clips: no model can be judged better than that."""
    combinations, judged, start = held_out_combinations(), [], time.perf_counter()
    for i in range(num_videos):
        attributes = combinations[i % len(combinations)]
        clip = render_clip(attributes, num_frames=num_frames, seed=seed + i)
        pixels = vae.decode(vae.encode(clip[None].permute(0, 1, 4, 2, 3).float() / 127.5 - 1))[0]
        judged.append(judge_video(to_uint8(pixels), attributes.caption))
    return Row("VAE round trip", 0, num_frames, 0, (time.perf_counter() - start) / num_videos, summarise(judged))


def score_sources(
    sources: Sequence[str],
    *,
    steps: Sequence[int],
    lengths: Sequence[int],
    num_videos: int,
    guidance: float,
    pipeline: str = TINY_WAN,
    raw: bool = False,
) -> Iterator[tuple[Row, list[tuple[str, Tensor]]]]:
    """Row by row, as they come: every source at every length (a pipeline at each number of Euler steps), and the VAE's
    ceiling at every length. `pipeline` names the text encoder and VAE."""
    loaded = {source: load_model(source, raw) for source in sources}
    vae, encoder = VideoVAE(pipeline), TextEncoder(pipeline)
    prompts = [attributes.caption for attributes in held_out_combinations()]
    embeds = [row.bfloat16() for row in encoder.encode(prompts)]
    unconditional = dict(zip(("empty", "negative"), encoder.encode(["", WAN_NEGATIVE_PROMPT]), strict=True))
    for model, *_ in loaded.values():  # a length that does not fit is an error before anything is sampled
        if isinstance(model, CausalModelBase):
            for num_frames in lengths:
                model.causal.blocks((num_frames - 1) // vae.temporal_ratio + 1)
    for num_frames in lengths:
        for source, (model, own_spec, uncond) in loaded.items():
            model.uncond_embeds = unconditional[uncond].bfloat16()
            euler = [SamplerSpec(tuple(euler_ladder(n, model.schedule.shift)), guidance) for n in steps]
            for spec in [own_spec] if own_spec else euler:
                yield score(source, model, spec, vae, prompts, embeds, num_frames=num_frames, num_videos=num_videos)
        yield vae_ceiling(vae, num_frames=num_frames, num_videos=num_videos), []


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with the scores of chance last."""
    lines = [
        f"| model | steps | frames | forwards | s/video | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |",
        "| --- " + "| --: " * (4 + len(COLUMNS)) + "|",
    ]
    for row in rows:
        scores = " | ".join(f"{row.scores[name]:.3f}" for name in COLUMNS)
        lines.append(
            f"| {row.model} | {row.steps or ''} | {row.num_frames} | {row.forwards or ''} | {row.seconds:.2f} | {scores} |"
        )
    chance = " | ".join(f"{CHANCE[name]:.3f}" if name in CHANCE else "" for name in COLUMNS)
    return "\n".join([*lines, f"| chance | | | | | {chance} |"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.score", description="Sample held-out captions of moving shapes and judge the videos."
    )
    parser.add_argument("--models", nargs="+", default=[TINY_WAN], help="pipelines or .../checkpoint/step-<N> folders")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 16, 4], help="Euler steps of pipelines (50 16 4)")
    parser.add_argument("--num-frames", type=int, nargs="+", default=[33], help="lengths in frames, 4n + 1 (33)")
    parser.add_argument("--num-videos", type=int, default=192, help="videos a row (192)")
    parser.add_argument("--guidance", type=float, default=3.0, help="u + g (c - u), of pipelines (3)")
    parser.add_argument("--pipeline", default=TINY_WAN, help="whose text encoder and VAE are used (tiny-wan)")
    parser.add_argument("--raw", action="store_true", help="of checkpoints the student itself, not its moving average")
    parser.add_argument("--output", default="", help="folder for rows.json and a contact sheet a row")
    args = parser.parse_args()
    for frames in args.num_frames:
        if frames < 1 or frames % 4 != 1:
            raise UserError(f"--num-frames {frames}: must be 4n + 1; nearest: {max(0, frames // 4) * 4 + 1}")
    for option, values in (("--steps", args.steps), ("--num-videos", [args.num_videos])):
        if min(values) < 1:
            raise UserError(f"{option} {min(values)}: must be >= 1")
    rows: list[Row] = []
    for row, shown in score_sources(
        args.models,
        steps=args.steps,
        lengths=args.num_frames,
        num_videos=args.num_videos,
        guidance=args.guidance,
        pipeline=args.pipeline,
        raw=args.raw,
    ):
        rows.append(row)
        print(table([row]).splitlines()[2], flush=True)
        if args.output and shown:
            name = f"{len(rows):02d}-{row.steps}-steps-{row.num_frames}-frames.png"
            contact_sheet(shown, Path(args.output) / name)
    if args.output:
        write_atomic(Path(args.output) / "rows.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    print(f"{args.num_videos} videos a row, guidance {args.guidance:g}\n{table(rows)}")


if __name__ == "__main__":
    cli(main)
