"""Score models on moving shapes: sample held-out captions, judge the videos, print one table.

    python -m fvtitan.score                                             # tiny-wan at 50, 16 and 4 steps, and the VAE's ceiling
    python -m fvtitan.score --models tiny-wan outputs/tiny_dfsft/checkpoint/step-1500 --num-frames 33 105 --steps 50
    python -m fvtitan.score --models tiny-wan outputs/tiny_dmd2/checkpoint/step-1000 --rungs 1000 1000,500 1000,750,500,250

A model is a pipeline in diffusers layout ("tiny-wan", a folder, a hub id), sampled by Euler steps, or an export or a checkpoint
of a run, sampled as its own method says; of a checkpoint the moving average is taken where there is one. `--rungs` samples
few-step students on these ladders, and pipelines too; `--untrained` adds what each checkpoint's student was before its
training, sampled in the same way. All models get the same captions and noise, so a second table compares checkpoints with
pipelines video by video.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvtitan.components.files import write_atomic
from fvtitan.components.validation import sample_latents, to_uint8
from fvtitan.components.visualise import contact_sheet
from fvtitan.data.moving_shapes import (
    CHANCE,
    Judgement,
    held_out_combinations,
    judge_video,
    measured,
    render_clip,
    summarise,
)
from fvtitan.errors import UserError, cli, nearest_multiples
from fvtitan.flow_matching import euler_ladder, few_step_ladder
from fvtitan.generate import load_model, parse_rungs
from fvtitan.models.base import CausalModelBase, ModelBase
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.pipeline import TINY_WAN
from fvtitan.models.wan.weights import is_checkpoint
from fvtitan.samplers import SamplerSpec, describe, num_forwards

BATCH = 16
SHEET_ROWS = 12
COLUMNS = (*CHANCE, "area_constancy", "area_drift", "speed_drift")
RESAMPLES, CONFIDENCE = 10_000, 0.9


@dataclass
class Row:
    """One line of the table: what was sampled and how, and what the judge measured."""

    model: str
    sampler: str
    steps: int
    num_frames: int
    forwards: int
    """Forwards of the network for one video; conditional and unconditional count as two."""
    seconds: float
    """Wall time a video, decoding included."""
    judged: list[Judgement]
    """Of each video."""
    thirds: tuple[list[Judgement], list[Judgement]] = ([], [])
    """Of the first and the last third of each video, when they were judged."""
    own: bool = False
    """A checkpoint or an export, not a pipeline of others."""
    untrained: bool = False
    """What the student of the checkpoint was before its training."""

    @property
    def scores(self) -> dict[str, float]:
        """What the judge measured, on average."""
        return summarise(self.judged)


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
    thirds: bool = False,
    seed: int = 0,
) -> tuple[Row, list[tuple[str, Tensor]]]:
    """Judge `num_videos` videos of 64 x 64, and with `thirds` the ends of each by themselves; prompts are taken in turn, each
    time with new noise. Returns the row and the first videos, uint8 `[T, H, W, 3]` with their prompts."""
    shape = ((num_frames - 1) // vae.temporal_ratio + 1, vae.vae.config.z_dim, *[64 // vae.spatial_ratio] * 2)
    judged, shown, start = [], [], time.perf_counter()
    parts: tuple[list[Judgement], list[Judgement]] = ([], [])
    for first in range(0, num_videos, BATCH):
        indices = range(first, min(first + BATCH, num_videos))
        embeds = [prompt_embeds[i % len(prompts)] for i in indices]
        with torch.no_grad():
            latents = sample_latents(model, spec, embeds, seed=seed, indices=indices, shape=shape)
        if not torch.isfinite(latents).all():
            raise UserError(f"{name}: the latents are not finite: damaged weights, or a ladder they cannot follow")
        for i, pixels in zip(indices, vae.decode(latents), strict=True):
            frames = to_uint8(pixels)
            judged.append(judge_video(frames, prompts[i % len(prompts)]))
            ends = (frames[: num_frames // 3], frames[-(num_frames // 3) :]) if thirds else ()
            for part, end in zip(parts, ends, strict=False):
                part.append(judge_video(end, prompts[i % len(prompts)]))
            shown += [(prompts[i % len(prompts)], frames)] if i < SHEET_ROWS else []
    seconds = (time.perf_counter() - start) / num_videos
    blocks = len(model.causal.blocks(shape[0])) if spec.streaming else 1
    steps, forwards = len(spec.sigmas) - 1, num_forwards(spec, blocks)
    return Row(name, describe(spec), steps, num_frames, forwards, seconds, judged, parts), shown


def vae_ceiling(vae: VideoVAE, *, num_frames: int, num_videos: int, seed: int = 0) -> Row:
    """What is left after encoding and decoding rendered clips: no model can be judged better than that."""
    combinations, judged, start = held_out_combinations(), [], time.perf_counter()
    for i in range(num_videos):
        attributes = combinations[i % len(combinations)]
        clip = render_clip(attributes, num_frames=num_frames, seed=seed + i)
        pixels = vae.decode(vae.encode(clip[None].permute(0, 1, 4, 2, 3).float() / 127.5 - 1))[0]
        judged.append(judge_video(to_uint8(pixels), attributes.caption))
    return Row("VAE round trip", "", 0, num_frames, 0, (time.perf_counter() - start) / num_videos, judged)


def score_sources(
    sources: Sequence[str],
    *,
    steps: Sequence[int],
    lengths: Sequence[int],
    num_videos: int | Sequence[int],
    guidance: Sequence[float],
    rungs: Sequence[Sequence[float]] = (),
    thirds: bool = False,
    pipeline: str = TINY_WAN,
    raw: bool = False,
    untrained: bool = False,
    ceiling: bool = True,
) -> Iterator[tuple[Row, list[tuple[str, Tensor]]]]:
    """Row by row, as they come: every source at every length, and the VAE's ceiling at every length. A pipeline has a row for
    each number of Euler steps and guidance; it and a few-step student have one for each ladder of `rungs` (timesteps before
    the shift; none: the student's own). `num_videos`: of every row, or one number a length. `untrained`: checkpoints also as
    they began. `pipeline` names the text encoder and VAE."""
    counts = [num_videos] * len(lengths) if isinstance(num_videos, int) else num_videos
    loaded = {}
    for source in sources:
        loaded[source, False] = load_model(source, raw=raw)
        if untrained and is_checkpoint(source):
            loaded[source, True] = load_model(source, untrained=True)
    vae, encoder = VideoVAE(pipeline), TextEncoder(pipeline)
    prompts = [attributes.caption for attributes in held_out_combinations()]
    embeds = [row.bfloat16() for row in encoder.encode(prompts)]
    for each in loaded.values():
        each.model.uncond_embeds = encoder.encode([each.contract.unconditional_prompt])[0].bfloat16()
        if isinstance(each.model, CausalModelBase):
            for num_frames in lengths:  # one that does not fit is an error before anything is sampled
                each.model.causal.blocks((num_frames - 1) // vae.temporal_ratio + 1)
    for num_frames, count in zip(lengths, counts, strict=True):
        for (source, before), each in loaded.items():
            model, own_spec, shift = each.model, each.contract.spec, each.contract.shift
            few = [SamplerSpec(few_step_ladder(timesteps, shift), solver="sde") for timesteps in rungs]
            if not each.own:
                specs = [SamplerSpec(tuple(euler_ladder(n, shift)), g) for g in guidance for n in steps] + few
            elif own_spec.solver == "sde" and rungs:
                specs = [dataclasses.replace(own_spec, sigmas=spec.sigmas) for spec in few]
            else:
                specs = [own_spec]
            for spec in specs:
                size = {"num_frames": num_frames, "num_videos": count}
                name = f"{source}, untrained" if before else source
                row, shown = score(name, model, spec, vae, prompts, embeds, **size, thirds=thirds)
                row.own, row.untrained = each.own, before
                yield row, shown
        if ceiling:
            yield vae_ceiling(vae, num_frames=num_frames, num_videos=count), []


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with the scores of chance last."""
    lines = [
        f"| model | sampler | steps | frames | forwards | s/video | {_titles(COLUMNS)} |",
        "| --- | --- " + "| --: " * (4 + len(COLUMNS)) + "|",
    ]
    for row in rows:
        cells = [row.sampler, row.steps or "", row.num_frames, row.forwards or "", f"{row.seconds:.2f}"]
        parts = {"": row.judged, ", first third": row.thirds[0], ", last third": row.thirds[1]}
        for part, judged in parts.items():
            if judged:
                scores = " | ".join(f"{summarise(judged)[name]:.3f}" for name in COLUMNS)
                lines.append(f"| {row.model}{part} | {' | '.join(map(str, cells))} | {scores} |")
    chance = " | ".join(f"{CHANCE[name]:.3f}" if name in CHANCE else "" for name in COLUMNS)
    return "\n".join([*lines, f"| chance | | | | | | {chance} |"])


def _titles(names: Sequence[str]) -> str:
    return " | ".join(name.replace("_", " ") for name in names)


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean of `first - second`, values `[N]` of the same captions and noise, with the ends of its bootstrap interval."""
    difference = first - second
    picks = np.random.RandomState(0).randint(len(difference), size=(RESAMPLES, len(difference)))
    means = difference[picks].mean(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(difference.mean()), float(low), float(high)


def comparison(rows: Sequence[Row]) -> str:
    """Every checkpoint against the pipelines of the same length (those with as many steps, and the one with the most) and the
    checkpoints before it with as many steps. Empty when there is nothing to compare."""
    lines = []
    for i, row in enumerate(rows):
        same = [other for other in rows[:i] if row.own and other.num_frames == row.num_frames]
        most = max((other.steps for other in same if not other.own), default=0)
        for other in [o for o in same if o.steps == row.steps or (o.steps == most and not o.own)]:
            cells = []
            for name in COLUMNS:
                mean, low, high = paired_difference(measured(row.judged, name), measured(other.judged, name))
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            names = f"{row.model}, {row.sampler} | {other.model}, {other.steps} x {other.sampler}"
            lines.append(f"| {names} | {row.num_frames} | {' | '.join(cells)} |")
    if not lines:
        return ""
    title = f"| model | minus | frames | {_titles(COLUMNS)} |"
    return "\n".join([title, "| --- | --- " + "| --: " * (1 + len(COLUMNS)) + "|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.score", description="Sample held-out captions of moving shapes and judge the videos."
    )
    parser.add_argument(
        "--models", nargs="+", default=[TINY_WAN], help="pipelines, exports or .../checkpoint/step-<N> folders"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 16, 4], help="Euler steps of pipelines (50 16 4)")
    parser.add_argument("--num-frames", type=int, nargs="+", default=[33], help="lengths in frames, 4n + 1 (33)")
    parser.add_argument(
        "--num-videos", type=int, nargs="+", default=[192], help="videos a row, or one number a length (192)"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0], help="u + g (c - u), of pipelines (3)")
    parser.add_argument("--rungs", nargs="+", default=[], help="ladders of few-step sampling, such as 1000,500")
    parser.add_argument("--thirds", action="store_true", help="judge the first and the last third of each video too")
    parser.add_argument("--pipeline", default=TINY_WAN, help="whose text encoder and VAE are used (tiny-wan)")
    parser.add_argument("--raw", action="store_true", help="of checkpoints the student itself, not its moving average")
    parser.add_argument("--untrained", action="store_true", help="checkpoints also as they were before their training")
    parser.add_argument("--no-ceiling", action="store_true", help="leave out rendered clips through the VAE")
    parser.add_argument("--output", default="", help="folder for rows.json and a contact sheet a row")
    args = parser.parse_args()
    for frames in args.num_frames:
        if frames < 1 or frames % 4 != 1:
            raise UserError(f"--num-frames {frames}: must be 4n + 1; nearest: {nearest_multiples(frames, 4, 1)}")
    for option, values in (("--steps", args.steps), ("--num-videos", args.num_videos)):
        if min(values) < 1:
            raise UserError(f"{option} {min(values)}: must be >= 1")
    for scale in args.guidance:
        if not 0 <= scale < float("inf"):
            raise UserError(f"--guidance {scale}: must be >= 0 (1: none)")
    if (args.raw or args.untrained) and not any(map(is_checkpoint, args.models)):
        flag = "--raw" if args.raw else "--untrained"
        raise UserError(f"{flag}: none of --models is the checkpoint of a run (.../checkpoint/step-<N>); leave it out")
    if args.thirds and min(args.num_frames) < 5:
        raise UserError(f"--thirds: --num-frames {min(args.num_frames)} has no thirds to judge; need at least 5")
    if len(args.num_videos) not in (1, len(args.num_frames)):
        raise UserError(
            f"--num-videos {' '.join(map(str, args.num_videos))}: need one number, or one for each of the "
            f"{len(args.num_frames)} lengths of --num-frames"
        )
    counts = args.num_videos if len(args.num_videos) > 1 else args.num_videos * len(args.num_frames)
    rungs = [parse_rungs(text) for text in args.rungs]
    rows: list[Row] = []
    for row, shown in score_sources(
        args.models,
        steps=args.steps,
        lengths=args.num_frames,
        num_videos=counts,
        guidance=args.guidance,
        rungs=rungs,
        thirds=args.thirds,
        pipeline=args.pipeline,
        raw=args.raw,
        untrained=args.untrained,
        ceiling=not args.no_ceiling,
    ):
        rows.append(row)
        print("\n".join(table([row]).splitlines()[2:-1]), flush=True)
        if args.output and shown:
            name = f"{len(rows):02d}-{row.steps}-steps-{row.num_frames}-frames.png"
            contact_sheet(shown, Path(args.output) / name)
    if args.output:
        records = [dataclasses.asdict(row) | {"scores": row.scores} for row in rows]
        write_atomic(Path(args.output) / "rows.json", json.dumps(records, indent=1))
    print(f"{' and '.join(map(str, args.num_videos))} videos a row\n{table(rows)}")
    if compared := comparison(rows):
        print(f"\nDifferences on the same captions and noise, with {CONFIDENCE:.0%} bootstrap intervals\n{compared}")


if __name__ == "__main__":
    cli(main)
