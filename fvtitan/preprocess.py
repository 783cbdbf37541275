"""Videos and captions, or prompts alone -> latent cache.

    python -m fvtitan.preprocess --data DIR --model PIPELINE --output CACHE --width 832 --height 480 --num-frames 81
    python -m fvtitan.preprocess --prompts FILE --model PIPELINE --output CACHE

DIR holds `metadata.jsonl` (`{"file_name": ..., "caption": ...}` a line) or `clip.mp4` beside `clip.txt`. FILE is text with
one prompt a line, or `.jsonl` with an object a line (`{"caption": ...}`); its cache has no latents, for methods that train
without videos, and no VAE is read. Every file or prompt ends as a sample or as a line in `skipped.jsonl` with the reason.
Under torchrun the work is split over the ranks, with the same result. A run that was interrupted, at any moment, goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from fvtitan.components.files import write_atomic
from fvtitan.components.progress import Progress
from fvtitan.data.latent_cache import FORMAT_VERSION, fingerprint, read_jsonl, shard_bytes, stack_text, text_key
from fvtitan.data.listing import Record, list_prompts, list_records
from fvtitan.data.video import Isolated, VideoError, VideoLimits, read_video
from fvtitan.distributed.utils import close_distributed, on_rank_zero
from fvtitan.errors import UserError, cli

SHARD_SAMPLES = 64
# Small clips are encoded up to 8 at a time; one of 81 x 480 x 832 fills a VAE by itself.
ENCODE_BATCH, ENCODE_PIXELS = 8, 2**23
# What a cache is made from: the option, and what lies there.
SOURCES = {"data": "videos or captions", "prompts": "prompts"}
VIDEO_OPTIONS = ("width", "height", "num_frames", "fps", *(limit.name for limit in dataclasses.fields(VideoLimits)))
# Wan's default negative prompt, as published with the model.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class PreprocessConfig:
    """What `python -m fvtitan.preprocess` does; its options have the same names. Either `data` or `prompts` is empty."""

    data: str
    model: str
    output: str
    prompts: str = ""
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    max_bad_fraction: float = 0.1
    overwrite: bool = False
    device: str = ""
    limits: VideoLimits = field(default_factory=VideoLimits)

    @property
    def unit(self) -> str:
        """What progress and errors count."""
        return "prompts" if self.prompts else "files"

    def check(self) -> None:
        if bool(self.data) == bool(self.prompts):
            raise UserError("need exactly one of --data (a folder of videos and captions) and --prompts (a file)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction}: must be in [0, 1]")
        if self.prompts:
            self._check_prompts()
        else:
            self._check_data()

    def _check_prompts(self) -> None:
        path = Path(self.prompts)
        if not path.is_file():
            found = "a folder" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
            raise UserError(f"--prompts {path}: {found}; need a file with one prompt a line (videos: --data)")

    def _check_data(self) -> None:
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            below = max(1, (self.num_frames - 1) // 4 * 4 + 1)
            raise UserError(f"--num-frames {self.num_frames}: must be 4n + 1; nearest: {below} or {below + 4}")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                below = max(16, value // 16 * 16)
                raise UserError(f"--{name} {value}: must be a multiple of 16; nearest: {below} or {below + 16}")
        if self.fps < 1:
            raise UserError(f"--fps {self.fps}: must be >= 1")
        self.limits.check()
        if not Path(self.data).is_dir():
            raise UserError(f"--data {self.data}: no such folder")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def build_contract(cfg: PreprocessConfig, records: list[Record]) -> dict[str, Any]:
    """Everything that determines the cache's content; a cache made under another contract is never mixed with this one."""
    from fvtitan.models.encoders import component_hash
    from fvtitan.models.pipeline import pipeline_folder, pipeline_text_len

    parts = ("tokenizer", "text_encoder") if cfg.prompts else ("tokenizer", "text_encoder", "vae")
    folder = pipeline_folder(cfg.model, *parts)
    listing = hashlib.sha256()
    for record in records:
        listing.update(json.dumps(dataclasses.astuple(record)).encode())
    content, hashes = listing.hexdigest(), {part: component_hash(folder / part) for part in parts}
    encoders = {"text_len": pipeline_text_len(folder), **hashes}
    if cfg.prompts:
        return {"prompts": content, "size": None, "negative_prompt": cfg.negative_prompt, "encoders": encoders}
    return {
        "data": content,
        "size": {"width": cfg.width, "height": cfg.height, "num_frames": cfg.num_frames, "fps": cfg.fps},
        "limits": dataclasses.asdict(cfg.limits),
        "negative_prompt": cfg.negative_prompt,
        "pixel_range": [-1, 1],
        "latents": "(mode - latents_mean) / latents_std, bfloat16, [T, C, H, W]",
        "encoders": encoders,
        "decoder": f"PyAV {importlib.metadata.version('av')}",
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _difference(recorded: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing in which two contracts differ, in words; empty when they are the same."""
    old, new = _flatten(recorded), _flatten(wanted)
    for source in SOURCES:
        if source in old and source not in new:
            return f"it was made with --{source}"
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            other = f"{key}: other {SOURCES[key]} than those in --{key} now" if key in SOURCES else ""
            return other or f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
    return ""


def _adopt_folder(cfg: PreprocessConfig, contract: dict[str, Any]) -> bool:
    """Make `output` ours; True when it already holds the finished cache. Raises when it holds something else."""
    output = Path(cfg.output)
    recorded = output / "contract.json"
    if output.is_dir():
        for temporary in output.glob(".*.tmp"):  # left by a run that was killed
            temporary.unlink()
    if cfg.overwrite and recorded.is_file():
        _clear(output)
    if recorded.is_file():
        try:
            difference = _difference(json.loads(recorded.read_text(encoding="utf-8")), contract)
        except ValueError as error:
            raise UserError(f"{recorded} is damaged ({error}): --overwrite makes the cache again") from None
        if difference:
            raise UserError(
                f"--output {output} was made under another contract: {difference}; use another folder, or --overwrite to "
                "make it again"
            )
        return (output / "manifest.json").is_file()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not a cache of ours: use another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(recorded, json.dumps(contract, indent=2, ensure_ascii=False) + "\n")
    return False


def _clear(output: Path) -> None:
    """Remove a cache's files: first what makes it a cache, last what makes it ours."""
    (output / "manifest.json").unlink(missing_ok=True)
    for pattern in ("shard-*.safetensors", "shard-*.safetensors.jsonl", "samples.jsonl", "skipped.jsonl"):
        for path in output.glob(pattern):
            path.unlink()
    (output / "prompts.safetensors").unlink(missing_ok=True)
    (output / "contract.json").unlink()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _is_whole(shard: Path) -> bool:
    """Whether a shard was finished, and still is as it was written."""
    try:
        lines = read_jsonl(shard.with_name(f"{shard.name}.jsonl"))
        with safe_open(shard, framework="pt") as stored:
            return {line["key"] for line in lines if "key" in line} <= set(stored.keys())
    except (OSError, ValueError, SafetensorError):
        return False


def _write_shard(
    name: str, records: list[Record], cfg: PreprocessConfig, text_encoder, vae, report: Callable[[int], None]
) -> None:
    """Encode one shard's records; its `.jsonl` comes last and says that the shard is whole. `report(n)`: n more done."""
    if cfg.prompts:
        lines, tensors = [_prompt_line(name, record) for record in records], {}
    else:
        with Isolated(read_video, cfg.limits) as read:
            lines, tensors = _encode_videos(name, records, cfg, vae, read, report)
    captions = sorted({line["caption"] for line in lines if "caption" in line})
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        for caption, embeds in zip(batch, text_encoder.encode(batch), strict=True):
            tensors[text_key(caption)] = embeds.to(torch.bfloat16).cpu().contiguous()
    for line in lines:
        if "key" in line:
            line["shape"] = list(tensors[line["key"]].shape)
            if text_encoder.cuts(line["caption"]):
                line["caption_cut_at"] = text_encoder.text_len
    write_atomic(Path(cfg.output) / name, shard_bytes(name, tensors))
    write_atomic(Path(cfg.output) / f"{name}.jsonl", _jsonl(lines))
    if cfg.prompts:
        report(len(records))


def _encode_videos(
    name: str, records: list[Record], cfg: PreprocessConfig, vae, read: Isolated, report: Callable[[int], None]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """A line for each record of the shard `name`, and the latents of the usable ones."""
    root = Path(cfg.data)
    size = {"num_frames": cfg.num_frames, "height": cfg.height, "width": cfg.width}
    encode_batch = max(1, min(ENCODE_BATCH, ENCODE_PIXELS // (cfg.num_frames * cfg.height * cfg.width)))
    tensors: dict[str, torch.Tensor] = {}
    lines: list[dict[str, Any]] = []
    pending: list[tuple[str, torch.Tensor]] = []

    def flush() -> None:
        if not pending:
            return
        pixels = torch.stack([frames for _, frames in pending]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        for (key, _), latents in zip(pending, vae.encode(pixels), strict=True):
            tensors[key] = latents.to(torch.bfloat16).cpu().contiguous()
        report(len(pending))
        pending.clear()

    for position, record in enumerate(records):
        problem = record.problem
        if not problem:
            try:
                frames = read(root / record.file, **size, fps=cfg.fps)
                key = f"latents.{position:05d}"
                lines.append(_sample_line(name, record, key, _sha256(root / record.file)))
                pending.append((key, frames))
            except VideoError as error:
                problem = str(error)
        if problem:
            lines.append(_skipped_line(record.file, problem))
            report(1)
        if len(pending) == encode_batch:
            flush()
    flush()
    return lines, tensors


def _prompt_line(name: str, record: Record) -> dict[str, Any]:
    if record.problem:
        return _skipped_line(record.file, record.problem)
    source = hashlib.sha256(record.caption.encode()).hexdigest()
    return _sample_line(name, record, text_key(record.caption), source)


def _sample_line(shard: str, record: Record, key: str, source_sha256: str) -> dict[str, Any]:
    """The shape is filled in when the tensor `key` is there."""
    line = {"sample_id": record.file, "caption": record.caption, "shard": shard}
    return line | {"key": key, "shape": [], "source_sha256": source_sha256}


def _skipped_line(file: str, reason: str) -> dict[str, Any]:
    return {"file": file.encode("utf-8", "backslashreplace").decode(), "reason": reason}


def _jsonl(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _commit(cfg: PreprocessConfig, contract: dict[str, Any], num_shards: int, ignored: list[Record]) -> str:
    """Merge the shards' lists and write the manifest, which makes the cache one. Returns what is in it, in words."""
    output = Path(cfg.output)
    names = [_shard_name(number) for number in range(num_shards)]
    lines = [line for name in names for line in read_jsonl(output / f"{name}.jsonl")]
    samples = [line for line in lines if "sample_id" in line]
    skipped = [line for line in lines if "reason" in line]
    unused = [_skipped_line(record.file, record.problem) for record in ignored]
    write_atomic(output / "samples.jsonl", _jsonl(samples))
    write_atomic(output / "skipped.jsonl", _jsonl(skipped + unused))
    bad, total = len(skipped), len(lines)
    if not total:
        raise UserError(f"--data {cfg.data}: no videos in it (metadata.jsonl, or clip.mp4 beside clip.txt)")
    if not samples or bad > cfg.max_bad_fraction * total:
        limit = f", more than --max-bad-fraction {cfg.max_bad_fraction:g}" if samples else ""
        first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
        raise UserError(
            f"{bad} of {total} {cfg.unit} cannot be used{limit}: see {output / 'skipped.jsonl'}; the first: {first}"
        )
    cut = sum("caption_cut_at" in sample for sample in samples)
    shapes: dict[str, int] = {}
    for sample in samples:
        shape = "prompts" if cfg.prompts else "x".join(map(str, sample["shape"]))
        shapes[shape] = shapes.get(shape, 0) + 1
    packages = ("torch", "av", "diffusers", "transformers", "safetensors")
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(contract, samples),
        "num_samples": len(samples),
        "samples_sha256": hashlib.sha256(_jsonl(samples).encode()).hexdigest(),
        "num_skipped": bad,
        "num_ignored": len(unused),
        "num_captions_cut": cut,
        "buckets": shapes,
        "model": cfg.model,
        "contract": contract,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "shards": {name: (output / name).stat().st_size for name in names},
    }
    write_atomic(output / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    said = f"{len(samples)} samples"
    said += f", {bad} {cfg.unit} skipped (see skipped.jsonl)" if bad else ""
    text_len = contract["encoders"]["text_len"]
    return said + (f", {cut} captions cut at {text_len} tokens (caption_cut_at in samples.jsonl)" if cut else "")


def preprocess(cfg: PreprocessConfig) -> None:
    """Make the cache, or finish it, or find it finished. All ranks of the process group (if there is one) take part.

    Raises `UserError` for everything that is wrong with the input, after writing the report where there is one.
    """
    from fvtitan.models.encoders import TextEncoder, VideoVAE

    cfg.check()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    output = Path(cfg.output)

    def plan() -> tuple[list[Record], list[Record], dict[str, Any], bool]:
        source = Path(cfg.prompts or cfg.data)
        records, ignored = (list_prompts(source), []) if cfg.prompts else list_records(source, exclude=output)
        contract = build_contract(cfg, records)
        return records, ignored, contract, _adopt_folder(cfg, contract)

    records, ignored, contract, finished = on_rank_zero(plan)
    if finished:
        if rank == 0:
            print(f"{output}: finished before, nothing to do", flush=True)
        return

    num_shards = -(-len(records) // SHARD_SAMPLES)
    todo = [number for number in range(rank, num_shards, world) if not _is_whole(output / _shard_name(number))]
    need_prompts = rank == 0 and not (output / "prompts.safetensors").is_file()
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text_encoder = TextEncoder(cfg.model, device=device) if todo or need_prompts else None
    vae = VideoVAE(cfg.model, device=device) if todo and cfg.data else None
    parts = {number: records[number * SHARD_SAMPLES : (number + 1) * SHARD_SAMPLES] for number in todo}
    progress = Progress(
        "preprocess", sum(map(len, parts.values())), cfg.unit + (" of this rank" if world > 1 else ""), quiet=rank != 0
    )
    for number, part in parts.items():
        _write_shard(_shard_name(number), part, cfg, text_encoder, vae, progress.add)
    if need_prompts:
        embeds = stack_text(text_encoder.encode(["", cfg.negative_prompt]))
        write_atomic(output / "prompts.safetensors", shard_bytes("prompts.safetensors", embeds))
    if world > 1:
        dist.barrier()
    said = on_rank_zero(lambda: _commit(cfg, contract, num_shards, ignored))
    if rank == 0:
        print(f"{output}: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.preprocess",
        description="Videos and captions, or prompts alone -> latent cache.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is parsed is what was given; the defaults are PreprocessConfig's
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder with metadata.jsonl, or clip.mp4 beside clip.txt")
    source.add_argument("--prompts", help="text file with one prompt a line, or .jsonl: a cache without latents")
    parser.add_argument("--model", required=True, help='pipeline in diffusers layout: folder, hub id, or "tiny-wan"')
    parser.add_argument("--output", required=True, help="cache folder to make, or to finish")
    parser.add_argument("--negative-prompt", help="default: Wan's own")
    parser.add_argument("--max-bad-fraction", type=float, help="more unusable files or prompts are an error (0.1)")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache made under another contract")
    parser.add_argument("--device", help="default: cuda when there is one, else cpu")
    clips = parser.add_argument_group("only with --data")
    clips.add_argument("--width", type=int, help="pixels, a multiple of 16 (default 832)")
    clips.add_argument("--height", type=int, help="pixels, a multiple of 16 (default 480)")
    clips.add_argument("--num-frames", type=int, help="frames of a clip, 4n + 1 (default 81)")
    clips.add_argument("--fps", type=int, help="frame rate that videos are resampled to (default 16)")
    default = VideoLimits()
    clips.add_argument("--max-bytes", type=int, help=f"largest file read ({default.max_bytes})")
    clips.add_argument("--max-seconds", type=float, help=f"longest video read ({default.max_seconds:g})")
    clips.add_argument("--max-pixels", type=int, help=f"largest frame read ({default.max_pixels})")
    clips.add_argument("--max-frames", type=int, help=f"most frames decoded of a file ({default.max_frames})")
    clips.add_argument(
        "--max-read-seconds", type=float, help=f"longest time that reading a file takes ({default.max_read_seconds:g})"
    )
    args = vars(parser.parse_args())
    useless = [f"--{name.replace('_', '-')}" for name in VIDEO_OPTIONS if name in args and "prompts" in args]
    if useless:
        raise UserError(f"{', '.join(useless)}: for --data only, a cache of --prompts has no clips: leave out")
    limits = {limit.name: args.pop(limit.name) for limit in dataclasses.fields(VideoLimits) if limit.name in args}
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if distributed:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for the slowest shard
        if torch.cuda.is_available():
            args["device"] = args.get("device") or f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        preprocess(PreprocessConfig(**{"data": "", **args}, limits=VideoLimits(**limits)))
    finally:
        if distributed:
            close_distributed()


if __name__ == "__main__":
    cli(main)
