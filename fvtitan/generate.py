"""Videos from prompts, sampled as the model must be.

    python -m fvtitan.generate --model tiny-wan --prompts "a small red circle moving left" --output outputs/videos
    python -m fvtitan.generate --model outputs/tiny_self_forcing/checkpoint/step-800 --stream --num-frames 105 \\
        --prompt-file prompts.jsonl --output outputs/videos
    torchrun --nproc_per_node=8 -m fvtitan.generate --model EXPORT --prompt-file prompts.txt --output outputs/videos

A model is an export (`python -m fvtitan.export`), sampled as its contract says; the checkpoint of a run, sampled as its method
says: its moving average where there is one; or another pipeline in diffusers layout ("tiny-wan", a folder, a hub id), sampled
by Euler steps with guidance on its scheduler's shift. What a flag changes of that is printed.

Under torchrun the prompts are spread over the ranks, each of which holds the whole model; the videos are the same whatever
their number. `--output` gets a video a prompt, `contact_sheet.png`, and `generate.json`: prompts, seeds and everything else
that makes the same videos again; `"complete"` in it becomes true when all of them are there. A video has its name when it is
whole. `--stream`: a causal model's frames are decoded and written block by block into `<name>.part.mp4`, which plays while it
grows; they may be more than in any clip it was trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fvtitan
from fvtitan import samplers
from fvtitan.components.files import write_atomic
from fvtitan.components.validation import fixed_noise, to_uint8
from fvtitan.components.visualise import contact_sheet, shown_times, thumbnail, video_name
from fvtitan.config import RoleConfig, read_toml
from fvtitan.contract import SamplerContract, contract_of, read_contract
from fvtitan.data.listing import CAPTION_KEYS
from fvtitan.data.video import VideoWriter
from fvtitan.distributed.utils import close_distributed, on_rank_zero, only_job, rank_and_world
from fvtitan.errors import UserError, cli, did_you_mean, nearest_multiples
from fvtitan.flow_matching import NUM_TIMESTEPS, ScheduleConfig, euler_ladder, few_step_ladder
from fvtitan.models import MODELS
from fvtitan.models.base import CausalModelBase, ModelBase
from fvtitan.models.encoders import TextEncoder, VideoVAE, clean_prompt
from fvtitan.models.pipeline import TINY_WAN, pipeline_folder, pipeline_shift, pipeline_text_len
from fvtitan.models.wan import weights
from fvtitan.samplers import SamplerSpec, describe

REPORT = "generate.json"
SHEET = "contact_sheet.png"
SHEET_ROWS = 64
LOCK = ".lock"
EULER_STEPS, GUIDANCE_SCALE = 50, 5.0  # Wan 2.1's own, for pipelines that say nothing
WAN_SIZE = {"num_frames": 81, "height": 480, "width": 832, "fps": 16}
TINY_SIZE = {"num_frames": 33, "height": 64, "width": 64, "fps": 16}


@dataclass
class Loaded:
    """A model ready to be sampled."""

    model: ModelBase
    contract: SamplerContract
    """How it must be sampled and the videos it was made for."""
    pipeline: str
    """Whose text encoder and VAE belong to it."""

    @property
    def own(self) -> bool:
        """Whether it says itself how it must be sampled; a pipeline of others does not, and is sampled by Euler steps."""
        return bool(self.contract.method)


def source_contract(source: str, shift: float | None = None) -> tuple[SamplerContract, str]:
    """How a model must be sampled, read without its weights, and whose text encoder and VAE belong to it. Of a pipeline
    that does not say, `method` is empty, and the shift its scheduler's unless given.

    Raises `UserError` when `source` is neither a pipeline nor a checkpoint, or damaged.
    """
    if weights.is_checkpoint(source):
        cfg = read_toml(Path(source) / "config.toml")
        return contract_of(cfg, weights.checkpoint_sizes(source, "student").text_len), cfg.data.pipeline
    folder = pipeline_folder(source, "transformer", "scheduler")
    contract = read_contract(folder)
    if contract is None:
        shift = pipeline_shift(folder) if shift is None else shift
        contract = SamplerContract(
            method="",
            solver="ode",
            sigmas=tuple(euler_ladder(EULER_STEPS, shift)),
            shift=shift,
            guidance_scale=GUIDANCE_SCALE,
            unconditional_prompt="",
            streaming=False,
            context_noise=0.0,
            text_len=pipeline_text_len(folder),
            **(TINY_SIZE if source == TINY_WAN else WAN_SIZE),
        )
    return contract, source


def load_model(
    source: str,
    *,
    raw: bool = False,
    untrained: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    shift: float | None = None,
) -> Loaded:
    """An export or another pipeline, or the student of a run's checkpoint: its moving average where there is one, unless
    `raw`; with `untrained`, what it was before its training. `dtype`: of weights and computation; None: as stored. `shift`: see
    `source_contract`.

    Raises `UserError` when `source` is neither, or damaged.
    """
    contract, pipeline = source_contract(source, shift)
    if weights.is_checkpoint(source):
        role = read_toml(Path(source) / "config.toml").models["student"]
        if untrained:
            sizes, tensors = weights.checkpoint_sizes(source, "student"), weights.read_untrained(source, "student")
        else:
            sizes, tensors = weights.read_checkpoint(source, "student", raw=raw)
    else:
        role = RoleConfig()
        if contract.causal is not None:
            role = RoleConfig(
                name="wan_causal",
                frames_per_block=contract.causal.frames_per_block,
                independent_first_frame=contract.causal.independent_first_frame,
                local_attn_frames=contract.causal.window,
                sink_frames=contract.causal.sink,
            )
        sizes, tensors = weights.read_pipeline(source)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model = MODELS[role.name].from_tensors(sizes, tensors, ScheduleConfig(shift=contract.shift), role, device)
    if isinstance(model, CausalModelBase):
        model.trained_frames = (contract.num_frames - 1) // 4 + 1
    return Loaded(model, contract, pipeline)


@torch.no_grad()
def generate(
    model: ModelBase, spec: SamplerSpec, vae: VideoVAE, embeds: Tensor, *, seed: int, shape: tuple[int, ...]
) -> Iterator[Tensor]:
    """Frames, uint8 `[n, H, W, 3]`, of the video with this seed and latents `shape` `(T, C, h, w)`: all at once, or block by
    block as they are decoded when the spec streams. It is what validation samples first in a run with this seed.

    Raises `UserError` when the latents are not finite.
    """
    cond = model.conditioning([embeds])
    uncond = model.unconditional(1) if spec.guidance_scale != 1 else None

    def fresh(rung: int) -> Tensor:
        return fixed_noise(seed, [0], shape, rung).to(model.device)

    def finite(latents: Tensor) -> Tensor:
        if not torch.isfinite(latents).all():
            raise UserError(f"seed {seed}: the latents are not finite: damaged weights, or a ladder they cannot follow")
        return latents

    if not spec.streaming:
        yield to_uint8(vae.decode(finite(samplers.sample(model, spec, fresh(0), cond, uncond, fresh)))[0])
        return
    assert isinstance(model, CausalModelBase)
    for pixels in vae.decode_stream(map(finite, samplers.stream(model, spec, fresh(0), cond, uncond, fresh))):
        yield to_uint8(pixels[0])


# ------------------------------------------------------------------------------------------------ what is asked for


@dataclass(frozen=True)
class Video:
    """One video to make."""

    file: str
    prompt: str
    seed: int


def read_prompt_file(path: str | Path) -> list[tuple[str, int | None]]:
    """Prompts, each with its seed or None: one a line, or in `.jsonl` an object a line, `{"caption": ..., "seed": ...}`.

    Raises `UserError` naming the first line that is wrong.
    """
    if Path(path).suffix.lower() == ".csv":
        raise UserError(f"--prompt-file {path}: need one prompt a line, or .jsonl; a .csv is not read here")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot read it: {error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompt-file {path}: no prompts in it: need one a line")
    if Path(path).suffix.lower() != ".jsonl":
        return [(line, None) for _, line in numbered]
    return [_prompt_of_line(line, f"--prompt-file {path}, line {number}") for number, line in numbered]


def _prompt_of_line(line: str, where: str) -> tuple[str, int | None]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f'{where}: need an object such as {{"caption": "a red circle", "seed": 3}}')
    for key in entry:
        if key not in (*CAPTION_KEYS, "seed"):
            raise UserError(f"{where}: unknown key {key!r}.{did_you_mean(key, (*CAPTION_KEYS, 'seed'))}")
    captions, seed = [entry[key] for key in CAPTION_KEYS if key in entry], entry.get("seed")
    if len(captions) != 1 or not isinstance(captions[0], str):
        raise UserError(f"{where}: need one of the keys {', '.join(CAPTION_KEYS)}, with a text")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UserError(f"{where}: seed = {seed!r}: must be an integer >= 0")
    return captions[0], seed


def list_videos(prompts: Sequence[tuple[str, int | None]], seed: int) -> list[Video]:
    """The videos of the prompts; those without a seed of their own get `seed` + their number."""
    videos = []
    for number, (prompt, own) in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"prompt {number} is not Unicode text: {prompt!r}")
        videos.append(Video(video_name(number, prompt), prompt, seed + number if own is None else own))
    return videos


def parse_rungs(text: str) -> tuple[float, ...]:
    """A ladder from the command line: timesteps before the shift, from 1000 down."""
    try:
        rungs = tuple(float(part) for part in text.split(","))
    except ValueError:
        rungs = ()
    if not rungs or rungs[0] != NUM_TIMESTEPS or rungs[-1] <= 0 or list(rungs) != sorted(set(rungs), reverse=True):
        raise UserError(
            f"--rungs {text}: need timesteps that descend from 1000, separated by commas, e.g. 1000,750,500,250"
        )
    return rungs


def wanted_contract(contract: SamplerContract, args: argparse.Namespace) -> SamplerContract:
    """The model's contract with what the flags change of it. Raises `UserError` for what the model cannot do."""
    changes: dict[str, Any] = {}
    for name in ("num_frames", "height", "width", "fps", "solver", "shift", "guidance_scale", "unconditional_prompt"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    shift = changes.get("shift", contract.shift)
    if args.rungs is not None:
        changes["sigmas"] = few_step_ladder(parse_rungs(args.rungs), shift)
    elif args.steps is not None:
        changes["sigmas"] = tuple(euler_ladder(args.steps, shift))
    elif "shift" in changes:
        changes["sigmas"] = few_step_ladder(contract.raw_timesteps, shift)
    wanted = dataclasses.replace(contract, **changes)
    if args.unconditional_prompt is not None and wanted.guidance_scale == 1:
        raise UserError("--negative-prompt has no effect with guidance 1; leave it out, or give --guidance")
    if args.stream and not wanted.streaming:
        raise UserError(
            f"--stream: {args.model} sees a whole video at once; need a causal model's checkpoint or export"
        )
    if wanted.causal is not None:
        try:
            wanted.causal.blocks((wanted.num_frames - 1) // 4 + 1)
        except UserError as error:
            raise UserError(f"--num-frames {wanted.num_frames}: {error}") from None
    wanted.check()
    return wanted


def check_flags(args: argparse.Namespace) -> None:
    """What can be known of the flags alone. Raises `UserError`."""
    frames = args.num_frames
    if frames is not None and (frames < 1 or frames % 4 != 1):
        raise UserError(f"--num-frames {frames}: must be 4n + 1; nearest: {nearest_multiples(frames, 4, 1)}")
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and (value < 16 or value % 16):
            raise UserError(f"--{name} {value}: must be a multiple of 16; nearest: {nearest_multiples(value, 16)}")
    for name, least in (("fps", 1), ("steps", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be >= {least}")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale < float("inf"):
        raise UserError(f"--guidance {args.guidance_scale}: must be >= 0 (1: none)")
    if args.shift is not None and not 0 < args.shift < float("inf"):
        raise UserError(f"--shift {args.shift}: must be > 0 (Wan 480p: 3, 720p: 5)")
    if args.raw and not weights.is_checkpoint(args.model):
        raise UserError(f"--raw: {args.model} is not the checkpoint of a run (.../checkpoint/step-<N>); leave it out")


def notes(contract: SamplerContract, wanted: SamplerContract) -> list[str]:
    """What the flags change of how the model says it must be sampled, and where they leave what it was trained at."""
    lines = []
    for name in ("solver", "shift", "guidance_scale", "unconditional_prompt", "raw_timesteps"):
        theirs, ours = getattr(contract, name), getattr(wanted, name)
        if theirs != ours:
            few = name != "raw_timesteps" or max(len(theirs), len(ours)) <= 8
            values = (theirs, ours) if few else (f"{len(theirs)} steps", f"{len(ours)} steps")
            lines.append(f"{name.removeprefix('raw_')}: {values[1]!r} instead of {values[0]!r}")
    if not contract.method:
        return lines
    trained, asked = ((c.num_frames, c.height, c.width) for c in (contract, wanted))
    window = contract.causal.window if contract.causal is not None else -1
    longer = wanted.streaming and window > 0 and wanted.num_frames > contract.num_frames
    if trained[1:] != asked[1:] or (trained[0] != asked[0] and not longer):
        size = "{} frames of {} x {}"
        lines.append(f"WARNING: the model was trained at {size.format(*trained)}, not at {size.format(*asked)}")
    if contract.fps != wanted.fps:
        lines.append(
            f"WARNING: trained at {contract.fps} fps: played at {wanted.fps}, everything moves at another speed"
        )
    return lines


# --------------------------------------------------------------------------------------------------------- the folder


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `UserError` when `output` cannot be the folder of these videos."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: {existing} is {'not writable' if existing.is_dir() else 'not a folder'}")
    if existing == output and any(path.name != LOCK for path in output.iterdir()) and not overwrite:
        raise UserError(
            f"--output {output}: the folder is not empty; take another, or --overwrite what generate made there"
        )


def clear_output(output: Path) -> None:
    """Remove what an earlier `generate` made in `output`, and left unfinished; nothing else."""
    try:
        files = [video["file"] for video in json.loads((output / REPORT).read_text(encoding="utf-8"))["videos"]]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output / REPORT} is damaged ({error!r}): --overwrite does not know what to remove") from None
    if not all(isinstance(file, str) and re.fullmatch(r"\d{4,}(-[a-z0-9-]+)?\.mp4", file) for file in files):
        raise UserError(f"{output / REPORT} names files that generate does not make: --overwrite removes nothing")
    for file in files:
        stem = file.removesuffix(".mp4")
        for path in (output / file, output / f"{stem}.part.mp4", *output.glob(f".{stem}.*.tmp.mp4")):
            path.unlink(missing_ok=True)
    (output / SHEET).unlink(missing_ok=True)
    (output / REPORT).unlink()


# ---------------------------------------------------------------------------------------------------------- the work


def encode_prompts(pipeline: str, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
    """Embeddings `[L_i, D]`, bfloat16 on the CPU; each prompt by itself, so they do not depend on each other."""
    encoder = TextEncoder(pipeline, device=device)
    for prompt in prompts:
        tokens = len(encoder.tokenizer(clean_prompt(prompt)).input_ids)
        if tokens > encoder.text_len:
            print(f"WARNING: only the first {encoder.text_len} of {tokens} tokens are read of {prompt!r}", flush=True)
    return [encoder.encode([prompt])[0].to("cpu", torch.bfloat16) for prompt in prompts]


def make_video(
    frames: Iterator[Tensor], path: Path, fps: int, times: Sequence[int], *, live: bool
) -> tuple[float, list[Any]]:
    """Write a video as its frames come; returns the seconds to the first of them, and thumbnails of the frames `times`."""
    start, first, done, shown = time.perf_counter(), 0.0, 0, []
    with VideoWriter(path, fps, live=live) as writer:
        for part in frames:
            writer.append(part)
            first = first or time.perf_counter() - start
            shown += [thumbnail(frame.numpy()) for number, frame in enumerate(part, done) if number in times]
            done += len(part)
    return first, shown


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Everything; all ranks of the process group, if there is one, take part. Raises `UserError` for bad input."""
    rank, world = rank_and_world()
    # ------------------------------------------------------------------ everything that can be known before any work
    check_flags(args)
    prompts = read_prompt_file(args.prompt_file) if args.prompt_file else [(text, None) for text in args.prompts]
    videos, output = list_videos(prompts, args.seed), Path(args.output)
    contract, pipeline = source_contract(args.model, args.shift)
    wanted, pipeline = wanted_contract(contract, args), args.pipeline or pipeline
    on_rank_zero(lambda: check_output(output, args.overwrite))

    # ------------------------------------------------------------------------- text, then the network, then the VAE
    guided = wanted.guidance_scale != 1
    texts = [video.prompt for video in videos] + ([wanted.unconditional_prompt] if guided else [])
    try:
        embeds = on_rank_zero(lambda: encode_prompts(pipeline, texts, device))
    except UserError as error:
        hint = "" if args.pipeline else "; --pipeline names another one's text encoder and VAE"
        raise UserError(f"{error}{hint}") from None
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = load_model(args.model, raw=args.raw, device=device, dtype=dtype, shift=args.shift).model
    sizes = model.transformer.cfg
    if embeds[0].shape[1] != sizes.text_dim:
        raise UserError(
            f"the text encoder of {pipeline} is {embeds[0].shape[1]} wide, {args.model} wants {sizes.text_dim}: "
            "give the pipeline that belongs to it (--pipeline)"
        )
    model.uncond_embeds = embeds.pop() if guided else None
    vae = VideoVAE(pipeline, device=device)
    if vae.vae.config.z_dim != model.latent_channels:
        raise UserError(
            f"the VAE of {pipeline} has {vae.vae.config.z_dim} channels, {args.model} {model.latent_channels}: "
            "give the pipeline that belongs to it (--pipeline)"
        )
    weights_from = RoleConfig(init_from=args.model, init_weights="raw" if args.raw else "auto")
    report = {
        "complete": False,
        "arguments": sys.argv[1:],
        "model": args.model,
        "weights_sha256": weights.weights_hash(weights_from),
        "pipeline": pipeline,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "versions": {"fvtitan": fvtitan.__version__, "torch": torch.__version__},
        "sampler": json.loads(wanted.to_json())["sampler"],
        "videos": [dataclasses.asdict(video) for video in videos],
    }

    def begin() -> None:
        check_output(output, args.overwrite)  # another job may have made its videos there in the meantime
        try:
            clear_output(output)
            write_atomic(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"--output {output}: {error.strerror}") from None
        size = f"{wanted.num_frames} frames of {wanted.height} x {wanted.width} at {wanted.fps} fps"
        steps = f"{len(wanted.sigmas) - 1} steps"
        print(f"{args.model}: {describe(wanted.spec)}, {steps}, {size}, {len(videos)} videos", flush=True)
        for note in notes(contract, wanted):
            print(note, flush=True)

    with only_job(output, output / LOCK, "name another --output"):
        on_rank_zero(begin)

        # ---------------------------------------------------------------------------------------------------- sampling
        shape = ((wanted.num_frames - 1) // 4 + 1, model.latent_channels, wanted.height // 8, wanted.width // 8)
        times = shown_times(wanted.num_frames).tolist()
        made: dict[int, tuple[float, list[Any]]] = {}
        mine = range(rank, len(videos), world)
        for count, number in enumerate(mine, 1):
            video, start = videos[number], time.perf_counter()
            frames = generate(model, wanted.spec, vae, embeds[number], seed=video.seed, shape=shape)
            first, shown = make_video(frames, output / video.file, wanted.fps, times, live=args.stream)
            seconds = time.perf_counter() - start
            made[number] = (seconds, shown if number < SHEET_ROWS else [])
            latency = f", the first block after {first:.2f} s" if wanted.streaming else ""
            where = f"rank {rank}: " if world > 1 else ""
            print(
                f"{where}{count}/{len(mine)} {output / video.file}: seed {video.seed}, {seconds:.2f} s, "
                f"{wanted.num_frames / seconds:.1f} frames/s{latency}",
                flush=True,
            )

        # ----------------------------------------------------------------------------------------- when all are there
        parts: list[Any] = [made] * world
        if world > 1:
            dist.all_gather_object(parts, made)
        if rank != 0:
            return
        everything = {number: item for part in parts for number, item in part.items()}
        rows = [
            (f"{video.prompt} (seed {video.seed})", everything[i][1]) for i, video in enumerate(videos[:SHEET_ROWS])
        ]
        contact_sheet(rows, output / SHEET, times=times)
        for number, video in enumerate(report["videos"]):
            video["seconds"] = round(everything[number][0], 3)
        write_atomic(output / REPORT, json.dumps(report | {"complete": True}, indent=1, ensure_ascii=False) + "\n")
        note = "" if len(videos) <= SHEET_ROWS else f", the first {SHEET_ROWS} of them"
        print(f"{len(videos)} videos, {output / REPORT}; look at {output / SHEET}{note}", flush=True)


def find_device(name: str) -> torch.device:
    """`name`, or the GPU of this rank where there is one, or the CPU. Raises `UserError` when there is no such device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.generate",
        description="Videos from prompts, sampled as the model must be.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="an export, a pipeline, or a .../checkpoint/step-<N> folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="one video each")
    source.add_argument("--prompt-file", help="one prompt a line, or .jsonl: an object with caption and seed a line")
    parser.add_argument("--output", required=True, help="folder for the videos, contact_sheet.png and generate.json")
    parser.add_argument("--overwrite", action="store_true", help="replace the videos that generate made in --output")
    parser.add_argument("--seed", type=int, default=0, help="of the first video, the next has the next one (0)")
    parser.add_argument("--stream", action="store_true", help="write a causal model's video block by block")
    size = parser.add_argument_group("the videos (default: what the model was trained at; others: Wan 2.1's)")
    size.add_argument("--num-frames", type=int, help="4n + 1")
    size.add_argument("--height", type=int, help="pixels, a multiple of 16")
    size.add_argument("--width", type=int, help="pixels, a multiple of 16")
    size.add_argument("--fps", type=int, help="frames a second of the files; Wan makes 16")
    how = parser.add_argument_group(
        "sampling (default: as the model must be; a pipeline of others: 50 steps, guidance 5)"
    )
    ladder = how.add_mutually_exclusive_group()
    ladder.add_argument("--steps", type=int, help="evenly spaced before the shift")
    ladder.add_argument("--rungs", help="timesteps before the shift, such as 1000,750,500,250")
    how.add_argument("--shift", type=float, help="timestep shift (default: the model's, or its scheduler's)")
    how.add_argument("--solver", choices=("ode", "sde"), help="Euler steps, or re-noised after each with fresh noise")
    how.add_argument("--guidance", dest="guidance_scale", type=float, metavar="G", help="u + g (c - u); 1: none")
    how.add_argument("--negative-prompt", dest="unconditional_prompt", metavar="TEXT", help="of the unconditional pass")
    parser.add_argument("--pipeline", help="whose text encoder and VAE (default: the model's)")
    parser.add_argument("--raw", action="store_true", help="of a checkpoint the student, not its moving average")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of weights and computation (default: as stored)"
    )
    parser.add_argument("--device", default="", help="default: cuda when there is one, else cpu")
    args = parser.parse_args()
    device = find_device(args.device)
    with contextlib.ExitStack() as at_exit:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for the slowest
            at_exit.callback(close_distributed)
        run(args, device)


if __name__ == "__main__":
    cli(main)
