"""Videos and captions -> latent cache.

    python -m fvtitan.preprocess --data DIR --model PIPELINE --output CACHE --width 832 --height 480 --num-frames 81

DIR holds `metadata.jsonl` (`{"file_name": ..., "caption": ...}` a line) or `clip.mp4` beside `clip.txt`. Every file ends as
a sample or as a line in `skipped.jsonl` with the reason. Under torchrun the work is split over the ranks, with the same
result. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save

from fvtitan.components.files import write_atomic
from fvtitan.components.metrics import duration
from fvtitan.data.latent_cache import FORMAT_VERSION, fingerprint, stack_text, text_key
from fvtitan.data.video import VideoError, VideoLimits, read_video
from fvtitan.errors import UserError, cli

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
FILE_KEYS = ("file_name", "path", "video_path", "video")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
SHARD_SAMPLES = 64
ENCODE_BATCH = 8
# Wan's default negative prompt, as published with the model.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class PreprocessConfig:
    """What `python -m fvtitan.preprocess` does; its options have the same names."""

    data: str
    model: str
    output: str
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    max_bad_fraction: float = 0.1
    overwrite: bool = False
    device: str = ""
    limits: VideoLimits = field(default_factory=VideoLimits)

    def check(self) -> None:
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
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction}: must be in [0, 1]")
        if not Path(self.data).is_dir():
            raise UserError(f"--data {self.data}: no such folder")


@dataclass(frozen=True)
class Record:
    """One line of the data set: a file of the root and its caption, or why it cannot be used."""

    file: str
    caption: str = ""
    problem: str = ""


def list_records(root: Path) -> list[Record]:
    """Every captioned video of a folder, and every file that looks like one, in a fixed order."""
    metadata = root / "metadata.jsonl"
    records = _from_metadata(metadata) if metadata.is_file() else _from_pairs(root)
    seen: set[str] = set()
    checked = []
    for record in records:
        problem = record.problem or _path_problem(root, record.file)
        if not problem and not record.caption.strip():
            problem = "the caption is empty"
        if record.file in seen:
            problem = "listed twice"
        seen.add(record.file)
        checked.append(dataclasses.replace(record, problem=problem))
    if metadata.is_file():
        videos = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        checked += [
            Record(name, problem="not in metadata.jsonl") for name in videos if name not in seen and name[0] != "."
        ]
    return checked


def _from_metadata(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"metadata.jsonl:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Record(where, problem="the line is not UTF-8")
            continue
        except ValueError as error:
            yield Record(where, problem=f"the line is not JSON: {error}")
            continue
        if not isinstance(entry, dict):
            yield Record(where, problem="the line is not a JSON object")
            continue
        file = next((entry[key] for key in FILE_KEYS if key in entry), None)
        caption = next((entry[key] for key in CAPTION_KEYS if key in entry), None)
        if not isinstance(file, str) or not file:
            yield Record(where, problem=f"no file: need one of the keys {', '.join(FILE_KEYS)}")
        elif not isinstance(caption, str):
            yield Record(file, problem=f"no caption: need one of the keys {', '.join(CAPTION_KEYS)}")
        else:
            yield Record(file, caption)


def _from_pairs(root: Path) -> Iterator[Record]:
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.name[0] != "."):
        name, text = path.relative_to(root).as_posix(), path.with_suffix(".txt")
        if not text.is_file():
            yield Record(name, problem=f"no caption: {text.name} does not exist")
            continue
        try:
            yield Record(name, text.read_text(encoding="utf-8").strip())
        except UnicodeDecodeError:
            yield Record(name, problem=f"the caption {text.name} is not UTF-8")


def _path_problem(root: Path, file: str) -> str:
    if file.startswith("metadata.jsonl:"):
        return ""
    if "\0" in file or "://" in file:
        return "not a local file name"
    if not (root / file).resolve().is_relative_to(root.resolve()):
        return "the path leaves the data folder"
    return "" if (root / file).is_file() else "no such file"


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

    folder = pipeline_folder(cfg.model, "tokenizer", "text_encoder", "vae")
    root = Path(cfg.data)
    listing = hashlib.sha256()
    for record in records:
        path = root / record.file
        size = path.stat().st_size if not record.problem else 0
        listing.update(json.dumps([record.file, record.caption, record.problem, size]).encode())
    return {
        "data": listing.hexdigest(),
        "size": {"width": cfg.width, "height": cfg.height, "num_frames": cfg.num_frames, "fps": cfg.fps},
        "limits": dataclasses.asdict(cfg.limits),
        "negative_prompt": cfg.negative_prompt,
        "pixel_range": [-1, 1],
        "latents": "(mode - latents_mean) / latents_std, bfloat16, [T, C, H, W]",
        "encoders": {
            "text_len": pipeline_text_len(folder),
            **{part: component_hash(folder / part) for part in ("tokenizer", "text_encoder", "vae")},
        },
        "decoder": f"PyAV {importlib.metadata.version('av')}",
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _adopt_folder(cfg: PreprocessConfig, contract: dict[str, Any]) -> bool:
    """Make `output` ours; True when it already holds the finished cache. Raises when it holds something else."""
    output = Path(cfg.output)
    recorded = output / "contract.json"
    if cfg.overwrite and recorded.is_file():
        shutil.rmtree(output)
    if recorded.is_file():
        old, new = _flatten(json.loads(recorded.read_text(encoding="utf-8"))), _flatten(contract)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"--output {output} was made under another contract: {key} is {old.get(key)!r} there and "
                    f"{new.get(key)!r} now; use another folder, or --overwrite to make it again"
                )
        return (output / "manifest.json").is_file()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not a cache of ours: use another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(recorded, json.dumps(contract, indent=2, ensure_ascii=False) + "\n")
    return False


def _write_shard(number: int, records: list[Record], cfg: PreprocessConfig, encode_text, vae) -> None:
    """Encode one shard's records; its `.jsonl` comes last and says that the shard is whole."""
    output, root, name = Path(cfg.output), Path(cfg.data), f"shard-{number:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    lines: list[dict[str, Any]] = []
    pending: list[tuple[Record, torch.Tensor]] = []

    def flush() -> None:
        if not pending:
            return
        pixels = torch.stack([frames for _, frames in pending]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        for (record, _), latents in zip(pending, vae.encode(pixels), strict=True):
            key = f"latents.{len(tensors):05d}"
            tensors[key] = latents.to(torch.bfloat16).cpu().contiguous()
            lines.append(
                {
                    "sample_id": record.file,
                    "caption": record.caption,
                    "shard": name,
                    "key": key,
                    "shape": list(latents.shape),
                    "source_sha256": _sha256(root / record.file),
                }
            )
        pending.clear()

    for record in records:
        problem = record.problem
        if not problem:
            try:
                frames = read_video(
                    root / record.file,
                    num_frames=cfg.num_frames,
                    height=cfg.height,
                    width=cfg.width,
                    fps=cfg.fps,
                    limits=cfg.limits,
                )
                pending.append((record, frames))
            except VideoError as error:
                problem = str(error)
        if problem:
            lines.append({"file": record.file, "reason": problem})
        if len(pending) == ENCODE_BATCH:
            flush()
    flush()
    captions = sorted({line["caption"] for line in lines if "caption" in line})
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        for caption, embeds in zip(batch, encode_text(batch), strict=True):
            tensors[text_key(caption)] = embeds.to(torch.bfloat16).cpu().contiguous()
    write_atomic(output / name, save(tensors))
    write_atomic(output / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _commit(cfg: PreprocessConfig, contract: dict[str, Any], num_shards: int) -> tuple[int, int]:
    """Merge the shards' lists and write the manifest, which makes the cache one. Returns (samples, skipped)."""
    output = Path(cfg.output)
    names = [f"shard-{number:05d}.safetensors" for number in range(num_shards)]
    lines = [
        json.loads(line)
        for name in names
        for line in (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    samples = [line for line in lines if "sample_id" in line]
    skipped = [line for line in lines if "reason" in line]
    for file, entries in (("samples.jsonl", samples), ("skipped.jsonl", skipped)):
        write_atomic(output / file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    bad, total = len(skipped), len(lines)
    if not samples or bad > cfg.max_bad_fraction * total:
        first = f"; the first: {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(
            f"{bad} of {total} files cannot be used, more than --max-bad-fraction {cfg.max_bad_fraction:g}: see "
            f"{output / 'skipped.jsonl'}{first}"
            if total
            else f"--data {cfg.data}: no videos in it (metadata.jsonl, or clip.mp4 beside clip.txt)"
        )
    shapes: dict[str, int] = {}
    for sample in samples:
        shape = "x".join(map(str, sample["shape"]))
        shapes[shape] = shapes.get(shape, 0) + 1
    packages = ("torch", "av", "diffusers", "transformers", "safetensors")
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(contract, samples),
        "num_samples": len(samples),
        "num_skipped": bad,
        "buckets": shapes,
        "model": cfg.model,
        "contract": contract,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "shards": {name: (output / name).stat().st_size for name in names},
    }
    write_atomic(output / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return len(samples), bad


def preprocess(cfg: PreprocessConfig) -> None:
    """Make the cache, or finish it, or find it finished. All ranks of the process group (if there is one) take part.

    Raises `UserError` for everything that is wrong with the input, after writing the report where there is one.
    """
    from fvtitan.models.encoders import TextEncoder, VideoVAE

    cfg.check()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    records = list_records(Path(cfg.data))
    contract = build_contract(cfg, records)
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome[0] = _adopt_folder(cfg, contract)
        except UserError as error:
            outcome[0] = str(error)
    _broadcast(outcome)
    if isinstance(outcome[0], str):
        raise UserError(outcome[0])
    output = Path(cfg.output)
    if outcome[0]:
        if rank == 0:
            print(f"{output}: finished before, nothing to do", flush=True)
        return

    num_shards = -(-len(records) // SHARD_SAMPLES)
    mine = range(rank, num_shards, world)
    todo = [s for s in mine if not (output / f"shard-{s:05d}.safetensors.jsonl").is_file()]
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text_encoder = TextEncoder(cfg.model, device=device) if todo or rank == 0 else None
    vae = VideoVAE(cfg.model, device=device) if todo else None
    start, done = time.time(), 0
    total = sum(len(records[s * SHARD_SAMPLES : (s + 1) * SHARD_SAMPLES]) for s in todo)
    for number in todo:
        part = records[number * SHARD_SAMPLES : (number + 1) * SHARD_SAMPLES]
        _write_shard(number, part, cfg, text_encoder.encode, vae)
        done += len(part)
        if rank == 0:
            left = (time.time() - start) / done * (total - done)
            print(
                f"preprocess: {done}/{total} clips{' of this rank' if world > 1 else ''}, {duration(left)} left",
                flush=True,
            )
    if rank == 0:
        write_atomic(output / "prompts.safetensors", save(stack_text(text_encoder.encode(["", cfg.negative_prompt]))))
    if world > 1:
        dist.barrier()
    outcome = [None]
    if rank == 0:
        try:
            outcome[0] = _commit(cfg, contract, num_shards)
        except UserError as error:
            outcome[0] = str(error)
    _broadcast(outcome)
    if isinstance(outcome[0], str):
        raise UserError(outcome[0])
    if rank == 0:
        samples, skipped = outcome[0]
        note = f", {skipped} files skipped (see skipped.jsonl)" if skipped else ""
        print(f"{output}: {samples} samples{note}", flush=True)


def _broadcast(objects: list[Any]) -> None:
    if dist.is_initialized():
        dist.broadcast_object_list(objects)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.preprocess", description="Videos and captions -> latent cache.", allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="folder with metadata.jsonl, or clip.mp4 beside clip.txt")
    parser.add_argument(
        "--model", required=True, help='pipeline with VAE and text encoder: folder, hub id, or "tiny-wan"'
    )
    parser.add_argument("--output", required=True, help="cache folder to make, or to finish")
    parser.add_argument("--width", type=int, default=832, help="pixels, a multiple of 16 (default 832)")
    parser.add_argument("--height", type=int, default=480, help="pixels, a multiple of 16 (default 480)")
    parser.add_argument("--num-frames", type=int, default=81, help="frames of a clip, 4n + 1 (default 81)")
    parser.add_argument("--fps", type=int, default=16, help="frame rate that videos are resampled to (default 16)")
    parser.add_argument("--negative-prompt", default=WAN_NEGATIVE_PROMPT, help="default: Wan's own")
    parser.add_argument("--max-bad-fraction", type=float, default=0.1, help="more unusable files are an error (0.1)")
    parser.add_argument("--max-bytes", type=int, default=VideoLimits.max_bytes, help="largest file read")
    parser.add_argument("--max-seconds", type=float, default=VideoLimits.max_seconds, help="longest video read")
    parser.add_argument("--max-pixels", type=int, default=VideoLimits.max_pixels, help="largest frame read")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache made under another contract")
    parser.add_argument("--device", default="", help="default: cuda when there is one, else cpu")
    args = vars(parser.parse_args())
    limits = VideoLimits(*(args.pop(name) for name in ("max_bytes", "max_seconds", "max_pixels")))
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if distributed:
        dist.init_process_group("gloo")
        if torch.cuda.is_available():
            args["device"] = args["device"] or f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        preprocess(PreprocessConfig(**args, limits=limits))
    finally:
        if distributed:
            dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
