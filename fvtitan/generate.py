"""Videos from prompts, by a pipeline or a checkpoint, sampled as the model must be.

    python -m fvtitan.generate --model tiny-wan --prompts "a small red circle moving left" --output outputs/videos
    python -m fvtitan.generate --model outputs/tiny_self_forcing/checkpoint/step-800 --stream --num-frames 105 \\
        --prompts "a small red circle moving left" --output outputs/videos

A model is a pipeline in diffusers layout ("tiny-wan", a folder, a hub id), sampled by Euler steps with guidance, or the
checkpoint of a run, sampled as its own method says: its moving average where there is one. `--stream`: a causal model's frames
are decoded and written block by block, so the video plays while it grows, and may be longer than any clip.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fvtitan import samplers
from fvtitan.components.validation import fixed_noise, read_prompts, to_uint8
from fvtitan.components.visualise import contact_sheet
from fvtitan.config import DataSection, RoleConfig, read_toml
from fvtitan.data.video import VideoWriter
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
from fvtitan.samplers import SamplerSpec, describe

WAN_SIZE = DataSection(num_frames=81, height=480, width=832)
TINY_SIZE = DataSection(num_frames=33, height=64, width=64)


@dataclass
class Loaded:
    """A model ready to be sampled."""

    model: ModelBase
    spec: SamplerSpec | None
    """How its method says it must be sampled; None: a pipeline, by Euler steps."""
    data: DataSection
    """The videos it was made for, its text encoder and VAE, and its unconditional prompt."""


def load_model(source: str, *, raw: bool = False, device: torch.device | str = "cpu") -> Loaded:
    """A pipeline, or the student of a run's checkpoint: its moving average where there is one, unless `raw`.

    Raises `UserError` when `source` is neither, or damaged.
    """
    if not weights.is_checkpoint(source):
        sizes, tensors = weights.read_pipeline(source)
        schedule = ScheduleConfig(shift=pipeline_shift(pipeline_folder(source, "transformer", "scheduler")))
        size = TINY_SIZE if source == TINY_WAN else WAN_SIZE
        data = DataSection(pipeline=source, num_frames=size.num_frames, height=size.height, width=size.width)
        return Loaded(WanModel.from_tensors(sizes, tensors, schedule, RoleConfig(), device), None, data)
    cfg = read_toml(Path(source) / "config.toml")
    sizes, tensors = weights.read_checkpoint(source, "student", raw=raw)
    role = cfg.models["student"]
    model = MODELS[role.name].from_tensors(sizes, tensors, cfg.schedule, role, device)
    if isinstance(model, CausalModelBase):
        model.trained_frames = cfg.data.latent_size()[0]
    return Loaded(model, METHODS[cfg.method.name].sampler(cfg), cfg.data)


def unconditional_prompt(data: DataSection) -> str:
    """The text of the unconditional branch."""
    return WAN_NEGATIVE_PROMPT if data.uncond_prompt == "negative" else ""


@torch.no_grad()
def generate(
    model: ModelBase,
    spec: SamplerSpec,
    vae: VideoVAE,
    embeds: Tensor,
    *,
    seed: int,
    number: int,
    shape: tuple[int, ...],
) -> Iterator[Tensor]:
    """Frames, uint8 `[n, H, W, 3]`, of video `number` with latents `shape` `(T, C, h, w)`: all at once, or block by block as
    they are decoded when the spec streams."""
    cond = model.conditioning([embeds])
    uncond = model.unconditional(1) if spec.guidance_scale != 1 else None

    def fresh(rung: int) -> Tensor:
        return fixed_noise(seed, [number], shape, rung).to(model.device)

    if not spec.streaming:
        yield to_uint8(vae.decode(samplers.sample(model, spec, fresh(0), cond, uncond, fresh))[0])
        return
    assert isinstance(model, CausalModelBase)
    for pixels in vae.decode_stream(samplers.stream(model, spec, fresh(0), cond, uncond, fresh)):
        yield to_uint8(pixels[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.generate", description="Videos from prompts.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a pipeline, or a .../checkpoint/step-<N> folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="one video each")
    source.add_argument("--prompt-file", help="a text file with one prompt a line")
    parser.add_argument("--output", required=True, help="folder for the videos and contact_sheet.png")
    parser.add_argument("--num-frames", type=int, default=0, help="4n + 1 (default: the model's)")
    parser.add_argument("--height", type=int, default=0, help="pixels, a multiple of 16 (default: the model's)")
    parser.add_argument("--width", type=int, default=0, help="pixels, a multiple of 16 (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="the noise of video i is that of (seed, i)")
    parser.add_argument("--stream", action="store_true", help="write a causal model's video block by block")
    parser.add_argument("--steps", type=int, default=50, help="Euler steps of a pipeline (50)")
    parser.add_argument("--guidance", type=float, default=5.0, help="u + g (c - u), of a pipeline (5)")
    parser.add_argument("--pipeline", default="", help="whose text encoder and VAE (default: the model's)")
    parser.add_argument("--raw", action="store_true", help="of a checkpoint the student, not its moving average")
    parser.add_argument("--device", default="", help="default: cuda when there is one, else cpu")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = args.prompts or read_prompts(args.prompt_file)

    loaded = load_model(args.model, raw=args.raw, device=device)
    model, data = loaded.model, loaded.data
    for name in ("num_frames", "height", "width", "pipeline"):
        if getattr(args, name):
            setattr(data, name, getattr(args, name))
    data.check()
    spec = loaded.spec or SamplerSpec(tuple(euler_ladder(args.steps, model.schedule.shift)), args.guidance)
    if args.stream and not spec.streaming:
        raise UserError(f"--stream: {args.model} sees a whole video at once; need a causal model's checkpoint")
    if isinstance(model, CausalModelBase):
        model.causal.blocks(data.latent_size()[0])  # a length that does not fit is an error before anything is loaded
    encoder = TextEncoder(data.pipeline, device=device)
    embeds = [row.bfloat16() for row in encoder.encode([*prompts, unconditional_prompt(data)])]
    model.uncond_embeds = embeds.pop()
    del encoder
    vae = VideoVAE(data.pipeline, device=device)
    frames, height, width = data.latent_size()
    shape = (frames, model.latent_channels, height, width)

    print(f"{args.model}: {describe(spec)}, {data.num_frames} frames of {data.height} x {data.width}", flush=True)
    output, shown = Path(args.output), []
    output.mkdir(parents=True, exist_ok=True)
    for number, (prompt, row) in enumerate(zip(prompts, embeds, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
        path = output / f"{number:04d}-{slug}.mp4"
        start, first, parts = time.perf_counter(), 0.0, []
        with VideoWriter(path, data.fps, live=args.stream) as writer:
            for part in generate(model, spec, vae, row, seed=args.seed, number=number, shape=shape):
                writer.append(part)
                parts.append(part)
                first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        latency = f", first block after {first:.2f} s" if spec.streaming else ""
        print(f"{path}: {data.num_frames / seconds:.1f} frames/s{latency}", flush=True)
        shown.append((prompt, torch.cat(parts)))
    contact_sheet(shown, output / "contact_sheet.png")


if __name__ == "__main__":
    cli(main)
