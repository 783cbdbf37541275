"""Whether a finished cache still is what its sources give: some samples are made again and compared with what is stored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvtitan.components.files import file_sha256
from fvtitan.data.clips import Bucket, parse_buckets
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.listing import Record, data_root, list_prompts, list_records
from fvtitan.data.video import Isolated, VideoError, VideoLimits, read_video
from fvtitan.errors import UserError
from fvtitan.models.encoders import TextEncoder, VideoVAE, component_hash
from fvtitan.models.pipeline import pipeline_folder
from fvtitan.preprocess import PreprocessConfig

# Two steps of bfloat16: encoding in a batch of another size rounds differently.
TOLERANCE = 2**-7


def difference(stored: Tensor, made: Tensor) -> float:
    """The largest difference of two tensors of one shape, in units of the larger of an element and of all their root mean
    square."""
    stored, made = stored.float(), made.to(torch.bfloat16).float().cpu()
    size = torch.maximum(stored.abs(), stored.square().mean().sqrt())
    return float(((made - stored).abs() / size.clamp(min=1e-6)).max())


def verify_cache(cfg: PreprocessConfig, count: int) -> None:
    """Make `count` random samples of the cache `cfg.output` again from `cfg.data` or `cfg.prompts` with the encoders of
    `cfg.model`, and the unconditional prompts; a line for each that differs.

    How they are made is read from the cache. Raises `UserError` when one differs by more than rounding, or its source did.
    """
    if dist.is_initialized():
        raise UserError("--verify is the work of one process: start it without torchrun")
    if count < 1:
        raise UserError(f"--verify {count}: must be >= 1")
    cache = LatentCache(cfg.output)
    contract = cache.manifest["contract"]
    made_with = "--data" if contract["size"] is not None else "--prompts"
    if made_with != ("--prompts" if cfg.prompts else "--data"):
        raise UserError(f"{cfg.output} was made with {made_with}: give it here too")
    cfg.check()
    folder = pipeline_folder(cfg.model, *(part for part in contract["encoders"] if part != "text_len"))
    for part, digest in contract["encoders"].items():
        if part != "text_len" and component_hash(folder / part) != digest:
            raise UserError(f"--model {cfg.model}: its {part} is not the one that {cfg.output} was made with")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text_encoder = TextEncoder(cfg.model, device=device)
    vae = VideoVAE(cfg.model, device=device) if cache.has_latents else None
    source = Path(cfg.prompts or cfg.data)
    records = list_prompts(source, cfg.keys) if cfg.prompts else list_records(source, Path(cfg.output), cfg.keys)[0]
    by_file = {record.file: record for record in records if not record.problem}
    chosen = sorted(random.SystemRandom().sample(range(len(cache)), min(count, len(cache))))
    bad = _prompt_problems(cache, text_encoder, contract["negative_prompt"])
    for index in chosen:
        sample_id = cache.samples[index]["sample_id"]
        problem = _sample_problem(cache, index, by_file, data_root(source), text_encoder, vae)
        print(f"{sample_id}: {problem or 'as stored'}", flush=True)
        bad += [f"{sample_id}: {problem}"] if problem else []
    if bad:
        raise UserError(f"{cfg.output}: {len(bad)} of {len(chosen) + 2} differ; the first: {bad[0]}")
    print(
        f"{cfg.output}: {len(chosen)} of {len(cache)} samples, and the unconditional prompts, are as stored", flush=True
    )


def _prompt_problems(cache: LatentCache, text_encoder: TextEncoder, negative_prompt: str) -> list[str]:
    made = text_encoder.encode(["", negative_prompt])
    stored = {"empty": cache.empty_prompt_embeds, "negative": cache.negative_prompt_embeds}
    problems = {name: _differs(old, new) for (name, old), new in zip(stored.items(), made, strict=True)}
    return [f"the {name} prompt: {problem}" for name, problem in problems.items() if problem]


def _sample_problem(
    cache: LatentCache,
    index: int,
    by_file: dict[str, Record],
    root: Path,
    text_encoder: TextEncoder,
    vae: VideoVAE | None,
) -> str:
    line, sample, contract = cache.samples[index], cache[index], cache.manifest["contract"]
    start = line.get("start", 0)
    record = by_file.get(line["sample_id"].removesuffix(f"#{start}") if start else line["sample_id"])
    if record is None:
        return "its source is not usable or not there any more"
    if record.caption != line["caption"]:
        return f"the caption was {line['caption']!r} and is {record.caption!r} now"
    if problem := _differs(sample["prompt_embeds"], text_encoder.encode([record.caption])[0]):
        return f"the caption's embedding: {problem}"
    if vae is None:
        return ""
    if file_sha256(root / record.file) != line["source_sha256"]:
        return "the file has changed"
    bucket = _bucket(contract["size"], sample["latents"].shape, vae)
    if bucket is None:
        return f"its shape {list(sample['latents'].shape)} is that of no bucket of the cache"
    try:
        size = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width}
        limits = VideoLimits(**contract["limits"])
        with Isolated(read_video, limits) as read:
            frames = read(root / record.file, **size, fps=contract["size"]["fps"], start=start)
    except VideoError as error:
        return str(error)
    return _differs(sample["latents"], vae.encode(frames[None].permute(0, 1, 4, 2, 3).float() / 127.5 - 1)[0])


def _bucket(size: dict[str, Any], shape: torch.Size, vae: VideoVAE) -> Bucket | None:
    """The bucket that latents `[T, C, H, W]` are of."""
    sizes = parse_buckets(",".join(size["buckets"])) if "buckets" in size else None
    sizes = sizes or (Bucket(size["width"], size["height"], size["num_frames"]),)
    frames, _, height, width = shape
    pixels = ((frames - 1) * vae.temporal_ratio + 1, height * vae.spatial_ratio, width * vae.spatial_ratio)
    return next((b for b in sizes if (b.num_frames, b.height, b.width) == pixels), None)


def _differs(stored: Tensor, made: Tensor) -> str:
    if stored.shape != made.shape:
        return f"stored as {list(stored.shape)}, made again {list(made.shape)}"
    off = difference(stored, made)
    return f"differs from what is stored by {off:.3g}, more than rounding ({TOLERANCE:.3g})" if off > TOLERANCE else ""
