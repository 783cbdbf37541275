"""Videos and captions, or prompts alone -> latent cache.

    python -m fvtitan.preprocess --data DATA --model PIPELINE --output CACHE --width 832 --height 480 --num-frames 81
    python -m fvtitan.preprocess --data DATA --model PIPELINE --output CACHE --buckets 832x480x81,480x832x81 --spans 4
    python -m fvtitan.preprocess --prompts FILE --model PIPELINE --output CACHE
    python -m fvtitan.preprocess --check --data DATA [--output LEDGER]
    python -m fvtitan.preprocess --verify 8 --data DATA --model PIPELINE --output CACHE

DATA is a folder with `clip.mp4` beside `clip.txt`, or with `metadata.jsonl` (`{"file_name": ..., "caption": ...}` a line) or
`metadata.csv`, or such a `.jsonl` or `.csv` file itself; its paths are relative to its folder. FILE is text with one prompt a
line, or `.jsonl` or `.csv` with captions; its cache has no latents, for methods that train without videos, and no VAE is read.
Every file or prompt ends as a sample or as a line in `skipped.jsonl` with the reason.
Under torchrun the work is split over the ranks, with the same result. A run that was interrupted, at any moment, goes on
where it stopped.
With several buckets a clip goes to the one that loses least of it. `--check` says what would become of every file, without
making anything; `--verify` makes some samples again and compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from fvtitan.components.files import file_sha256, is_temporary, write_atomic
from fvtitan.components.progress import Progress
from fvtitan.components.resume import flattened
from fvtitan.data.clips import Bucket, parse_buckets, plan_clip
from fvtitan.data.latent_cache import FORMAT_VERSION, fingerprint, read_jsonl, shard_bytes, stack_text, text_key
from fvtitan.data.listing import (
    CAPTION_KEYS,
    FILE_KEYS,
    LIST_SUFFIXES,
    Keys,
    Record,
    data_root,
    is_text,
    list_prompts,
    list_records,
)
from fvtitan.data.video import Isolated, VideoError, VideoLimits, probe_video, read_video
from fvtitan.distributed.utils import close_distributed, on_rank_zero, only_job, rank_and_world
from fvtitan.errors import UserError, cli, shortened

SHARD_SAMPLES = 64
# Small clips are encoded up to 8 at a time; one of 81 x 480 x 832 fills a VAE by itself.
ENCODE_BATCH, ENCODE_PIXELS = 8, 2**23
NO_VIDEOS = "no videos in it (metadata.jsonl or .csv, or clip.mp4 beside clip.txt)"
# Options that only these read.
CHECK_OPTIONS = ("batch_size", "max_loss_share", "contact_sheet")
MAKE_OPTIONS = ("model", "device", "negative_prompt", "max_bad_fraction", "overwrite")
# What `--check` writes; a cache may be made beside it.
LEDGER_FILES = r"ledger\.(jsonl|csv)|contact_sheet-\d+\.png"
CACHE_FILES = (
    r"(contract|manifest)\.json|(samples|skipped)\.jsonl|prompts\.safetensors|shard-\d+\.safetensors(\.jsonl)?"
)
# What a cache is made from: the option, and what lies there.
SOURCES = {"data": "videos or captions", "prompts": "prompts"}
LIMITS = tuple(limit.name for limit in dataclasses.fields(VideoLimits))
CUTTING = ("width", "height", "num_frames", "buckets", "spans", "fps", *LIMITS)
VIDEO_OPTIONS = (*CUTTING, "file_key")
# Wan's default negative prompt, as published with the model.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class PreprocessConfig:
    """What `python -m fvtitan.preprocess` does; its options have the same names. Either `data` or `prompts` is empty.

    `buckets`, as `parse_buckets` reads them, take the place of width, height and num_frames; empty: these are the only one.
    """

    data: str
    model: str
    output: str
    prompts: str = ""
    width: int = 832
    height: int = 480
    num_frames: int = 81
    buckets: str = ""
    spans: int = 1
    fps: int = 16
    file_key: str = ""
    caption_key: str = ""
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    max_bad_fraction: float = 0.1
    overwrite: bool = False
    device: str = ""
    limits: VideoLimits = field(default_factory=VideoLimits)

    @property
    def unit(self) -> str:
        """What progress and errors count."""
        return "prompts" if self.prompts else "files"

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The buckets of clips."""
        return parse_buckets(self.buckets) if self.buckets else (Bucket(self.width, self.height, self.num_frames),)

    @property
    def keys(self) -> Keys:
        """How lists name their fields."""
        file, caption = (self.file_key,) if self.file_key else FILE_KEYS, (self.caption_key,)
        return Keys(file, caption if self.caption_key else CAPTION_KEYS)

    @property
    def shard_records(self) -> int:
        """Files or prompts of a shard; each may be as many samples as it has spans."""
        return max(1, SHARD_SAMPLES // self.spans)

    def check(self) -> None:
        if bool(self.data) == bool(self.prompts):
            raise UserError("need exactly one of --data (a folder of videos and captions) and --prompts (a file)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction}: must be in [0, 1]")
        if not is_text(self.negative_prompt):
            raise UserError(f"--negative-prompt {shortened(self.negative_prompt)}: not Unicode text, need UTF-8")
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
        for bucket in self.sizes:
            bucket.check(("--width", "--height", "--num-frames"))
        if not 1 <= self.spans <= SHARD_SAMPLES:
            raise UserError(f"--spans {self.spans}: must be in 1 .. {SHARD_SAMPLES}; longer videos: split them before")
        if self.fps < 1:
            raise UserError(f"--fps {self.fps}: must be >= 1")
        self.limits.check()
        data, kinds = Path(self.data), " or ".join(LIST_SUFFIXES)
        if not data.is_dir() and not (data.is_file() and data.suffix.lower() in LIST_SUFFIXES):
            found = f"not a {kinds} file" if data.is_file() else f"no such folder or {kinds} file"
            raise UserError(f"--data {self.data}: {found}")


def build_contract(cfg: PreprocessConfig, records: list[Record]) -> dict[str, Any]:
    """Everything that determines the cache's content; a cache made under another contract is never mixed with this one."""
    from fvtitan.models.encoders import component_hash
    from fvtitan.models.pipeline import pipeline_folder, pipeline_text_len

    parts = ("tokenizer", "text_encoder") if cfg.prompts else ("tokenizer", "text_encoder", "vae")
    folder = pipeline_folder(cfg.model, *parts)
    listing = hashlib.sha256()
    for record in records:
        listing.update(json.dumps([record.file, record.caption, record.problem, record.identity]).encode())
    content, hashes = listing.hexdigest(), {part: component_hash(folder / part) for part in parts}
    encoders = {"text_len": pipeline_text_len(folder), **hashes}
    if cfg.prompts:
        return {"prompts": content, "size": None, "negative_prompt": cfg.negative_prompt, "encoders": encoders}
    return {
        "data": content,
        "size": _size(cfg),
        "limits": dataclasses.asdict(cfg.limits),
        "negative_prompt": cfg.negative_prompt,
        "pixel_range": [-1, 1],
        "latents": "(mode - latents_mean) / latents_std, bfloat16, [T, C, H, W]",
        "encoders": encoders,
        "decoder": f"PyAV {importlib.metadata.version('av')}",
    }


def _size(cfg: PreprocessConfig) -> dict[str, Any]:
    """How videos are cut: one size, or several; and at most how many spans of one, where that is not 1."""
    sizes = cfg.sizes
    one = dataclasses.asdict(sizes[0])
    spans = {"spans": cfg.spans} if cfg.spans > 1 else {}
    return (one if len(sizes) == 1 else {"buckets": [str(bucket) for bucket in sizes]}) | {"fps": cfg.fps} | spans


def _difference(recorded: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing in which two contracts differ, in words; empty when they are the same."""
    old, new = flattened(recorded), flattened(wanted)
    for source in SOURCES:
        if source in old and source not in new:
            return f"it was made with --{source}"
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            other = f"{key}: other {SOURCES[key]} than those in --{key} now" if key in SOURCES else ""
            return other or f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
    return ""


def _adopt_folder(cfg: PreprocessConfig, contract: dict[str, Any]) -> bool:
    """Make `output` ours; True when it already holds the finished cache. Raises when it holds something else.

    `overwrite` clears a finished cache and one that does not fit; an unfinished one of the same contract goes on.
    """
    output = Path(cfg.output)
    recorded, manifest = output / "contract.json", output / "manifest.json"
    if recorded.is_file():
        problem = _misfit(recorded, contract)
        if problem and not cfg.overwrite:
            raise UserError(problem)
        _clear_temporaries(output, CACHE_FILES)
        if not problem and not (cfg.overwrite and manifest.is_file()):
            return manifest.is_file()
        _clear(output)
    elif output.exists() and not (output.is_dir() and all(map(_may_lie_there, output.iterdir()))):
        raise UserError(f"--output {output} exists and is not a cache of ours: use another folder")
    output.mkdir(parents=True, exist_ok=True)
    _clear_temporaries(output, r"contract\.json")
    write_atomic(recorded, json.dumps(contract, indent=2, ensure_ascii=False) + "\n")
    return False


def _misfit(recorded: Path, contract: dict[str, Any]) -> str:
    """Why the cache of the recorded contract is none of this one, and what to do; empty when it is."""
    try:
        content = json.loads(recorded.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds no object, but {shortened(content)!r}")
    except (ValueError, RecursionError) as error:
        return f"{recorded} is damaged ({error}): --overwrite makes the cache again"
    difference = _difference(content, contract)
    where = f"--output {recorded.parent} was made under another contract"
    return f"{where}: {difference}; use another folder, or --overwrite to make it again" if difference else ""


def _may_lie_there(path: Path) -> bool:
    """What a cache may be made beside: a ledger, and what a run leaves that was killed while it wrote that or the contract."""
    names = rf"{LEDGER_FILES}|contract\.json"
    return bool(re.fullmatch(LEDGER_FILES, path.name)) or is_temporary(path, names)


def _clear_temporaries(output: Path, names: str) -> None:
    """Remove what runs left that were killed while they wrote one of these files."""
    for path in list(output.iterdir()):
        if is_temporary(path, names):
            path.unlink()


def _clear(output: Path) -> None:
    """Remove a cache's files but what makes it ours, which fits no contract from then on: no run goes on with the rest."""
    write_atomic(output / "contract.json", "{}\n")
    (output / "manifest.json").unlink(missing_ok=True)
    for pattern in ("shard-*.safetensors", "shard-*.safetensors.jsonl", "samples.jsonl", "skipped.jsonl"):
        for path in output.glob(pattern):
            path.unlink()
    (output / "prompts.safetensors").unlink(missing_ok=True)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _is_whole(shard: Path, records: Sequence[Record]) -> bool:
    """Whether a shard of these records was finished, and still is as it was written: each has its lines, and the tensors are
    those that the lines name."""
    try:
        lines = read_jsonl(shard.with_name(f"{shard.name}.jsonl"))
        told = [line.get("sample_id", line.get("file")) for line in lines if "start" not in line]  # not a later span
        named = {key for line in lines if "key" in line for key in (line["key"], text_key(line["caption"]))}
        with safe_open(shard, framework="pt") as stored:
            return told == [_shown(record.file) for record in records] and named == set(stored.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def _write_shard(
    name: str, records: list[Record], cfg: PreprocessConfig, text_encoder, vae, report: Callable[[int], None]
) -> None:
    """Encode one shard's records; its `.jsonl` comes last and says that the shard is whole. `report(n)`: n more done."""
    if cfg.prompts:
        lines, tensors = [_prompt_line(name, record) for record in records], {}
    else:
        with Isolated(probe_video, cfg.limits) as probe, Isolated(read_video, cfg.limits) as read:
            lines, tensors = _encode_videos(name, records, cfg, vae, probe, read, report)
    captions = sorted({line["caption"] for line in lines if "caption" in line})
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        for caption, embeds in zip(batch, text_encoder.encode(batch), strict=True):
            tensors[text_key(caption)] = embeds.to(torch.bfloat16).cpu().contiguous()
    for line in lines:
        if "key" in line:
            made = {"text encoder": text_key(line["caption"])} | ({} if cfg.prompts else {"VAE": line["key"]})
            for encoder, key in made.items():
                _check_finite(tensors[key], line["sample_id"], encoder, cfg)
            line["shape"] = list(tensors[line["key"]].shape)
            if text_encoder.cuts(line["caption"]):
                line["caption_cut_at"] = text_encoder.text_len
    write_atomic(Path(cfg.output) / name, shard_bytes(name, tensors))
    write_atomic(Path(cfg.output) / f"{name}.jsonl", _jsonl(lines))
    if cfg.prompts:
        report(len(records))


def _check_finite(tensor: torch.Tensor, sample: str, encoder: str, cfg: PreprocessConfig) -> None:
    if not tensor.isfinite().all():
        raise UserError(
            f"{sample}: the {encoder} of --model {cfg.model} gives NaN or Inf for it, which is not written: are the weights "
            "damaged? Name another pipeline, or --device cpu"
        )


def _encode_videos(
    name: str,
    records: list[Record],
    cfg: PreprocessConfig,
    vae,
    probe: Isolated,
    read: Isolated,
    report: Callable[[int], None],
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """A line for each record of the shard `name`, and the latents of the usable ones."""
    root = data_root(Path(cfg.data))
    tensors: dict[str, torch.Tensor] = {}
    lines: list[dict[str, Any]] = []
    pending: dict[Bucket, list[tuple[str, torch.Tensor]]] = {}

    def flush(bucket: Bucket) -> None:
        keys, clips = zip(*pending.pop(bucket), strict=True)
        pixels = torch.stack(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        for key, latents in zip(keys, vae.encode(pixels), strict=True):
            tensors[key] = latents.to(torch.bfloat16).cpu().contiguous()

    for position, record in enumerate(records):
        problem, done, source = record.problem, len(lines), ""
        try:
            plan = None if problem else plan_clip(probe(root / record.file), cfg.sizes, fps=cfg.fps, spans=cfg.spans)
            for start in plan.starts if plan else ():
                bucket, key = plan.bucket, f"latents.{position:05d}" + (f".{start:07d}" if start else "")
                frames = read(root / record.file, **dataclasses.asdict(bucket), fps=cfg.fps, start=start)
                source = source or file_sha256(root / record.file)
                lines.append(_sample_line(name, record, key, source, start))
                pending.setdefault(bucket, []).append((key, frames))
                if len(pending[bucket]) == _encode_batch(bucket):
                    flush(bucket)
        except VideoError as error:
            problem = str(error)
        if problem:
            lines[done:] = [_skipped_line(record.file, problem)]  # damaged further on: none of its spans is used
        report(1)
    for bucket in list(pending):
        flush(bucket)
    used = {line["key"] for line in lines if "key" in line}
    return lines, {key: latents for key, latents in tensors.items() if key in used}


def _encode_batch(bucket: Bucket) -> int:
    """How many clips the VAE takes at once."""
    return max(1, min(ENCODE_BATCH, ENCODE_PIXELS // (bucket.num_frames * bucket.height * bucket.width)))


def _prompt_line(name: str, record: Record) -> dict[str, Any]:
    if record.problem:
        return _skipped_line(record.file, record.problem)
    source = hashlib.sha256(record.caption.encode()).hexdigest()
    return _sample_line(name, record, text_key(record.caption), source)


def _sample_line(shard: str, record: Record, key: str, source_sha256: str, start: int = 0) -> dict[str, Any]:
    """The shape is filled in when the tensor `key` is there. A span that begins later says at which frame of the cache's
    rate."""
    line = {"sample_id": f"{record.file}#{start}" if start else record.file, "caption": record.caption, "shard": shard}
    line |= {"key": key, "shape": [], "source_sha256": source_sha256}
    return line | ({"start": start} if start else {})


def _skipped_line(file: str, reason: str) -> dict[str, Any]:
    return {"file": _shown(file), "reason": reason}


def _shown(file: str) -> str:
    """A name as lists have it, also one that is not UTF-8."""
    return file.encode("utf-8", "backslashreplace").decode()


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
    bad = len(skipped)
    total = bad + sum("start" not in sample for sample in samples)
    if not total:
        raise UserError(f"--data {cfg.data}: {NO_VIDEOS}")
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

    Raises `UserError` for everything that is wrong with the input, after writing the report where there is one, and when
    another job is making the same cache.
    """
    cfg.check()
    with only_job(cfg.output):
        _preprocess(cfg)


def _preprocess(cfg: PreprocessConfig) -> None:
    from fvtitan.models.encoders import TextEncoder, VideoVAE

    rank, world = rank_and_world()
    output = Path(cfg.output)

    def plan() -> tuple[list[Record], list[Record], dict[str, Any], bool]:
        source = Path(cfg.prompts or cfg.data)
        records, ignored = (
            (list_prompts(source, cfg.keys), []) if cfg.prompts else list_records(source, output, cfg.keys)
        )
        contract = build_contract(cfg, records)
        return records, ignored, contract, _adopt_folder(cfg, contract)

    records, ignored, contract, finished = on_rank_zero(plan)
    if finished:
        if rank == 0:
            print(f"{output}: finished before, nothing to do", flush=True)
        return

    num_shards = -(-len(records) // cfg.shard_records)
    parts = {
        number: records[number * cfg.shard_records : (number + 1) * cfg.shard_records]
        for number in range(rank, num_shards, world)
    }
    todo = {number: part for number, part in parts.items() if not _is_whole(output / _shard_name(number), part)}
    need_prompts = rank == 0 and not (output / "prompts.safetensors").is_file()
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text_encoder = TextEncoder(cfg.model, device=device) if todo or need_prompts else None
    vae = VideoVAE(cfg.model, device=device) if todo and cfg.data else None
    progress = Progress(
        "preprocess", sum(map(len, todo.values())), cfg.unit + (" of this rank" if world > 1 else ""), quiet=rank != 0
    )
    for number, part in todo.items():
        _write_shard(_shard_name(number), part, cfg, text_encoder, vae, progress.add)
    if need_prompts:
        embeds = stack_text(text_encoder.encode(["", cfg.negative_prompt]))
        for key, tensor in embeds.items():
            _check_finite(tensor, f"the {key} prompt", "text encoder", cfg)
        write_atomic(output / "prompts.safetensors", shard_bytes("prompts.safetensors", embeds))
    if world > 1:
        dist.barrier()
    said = on_rank_zero(lambda: _commit(cfg, contract, num_shards, ignored))
    if rank == 0:
        print(f"{output}: {said}", flush=True)


def check_options(args: dict[str, Any]) -> None:
    """Raise `UserError` for options, as they were given, that would not be read, or that are missing."""

    def refuse(names: Iterable[str], why: str) -> None:
        useless = [f"--{name.replace('_', '-')}" for name in names if name in args]
        if useless:
            raise UserError(f"{', '.join(useless)}: {why}: leave out")

    needed = ("model", "output")
    if "prompts" in args:
        refuse(VIDEO_OPTIONS, "for --data only, a cache of --prompts has no clips")
        refuse(("check",), "says what becomes of videos; --prompts are all used as they are")
    if "check" in args:
        refuse(MAKE_OPTIONS, "for making a cache, and --check makes none")
        needed = ("output",) if "contact_sheet" in args else ()
    else:
        refuse(CHECK_OPTIONS, "for --check only")
    if "verify" in args:
        refuse((*CUTTING, *MAKE_OPTIONS[2:]), "--verify takes it from the cache")
    if "buckets" in args:
        refuse(("width", "height", "num_frames"), "--buckets say the sizes")
    for name in needed:
        if name not in args:
            raise UserError(f"--{name} is needed")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.preprocess",
        description="Videos and captions, or prompts alone -> latent cache.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is parsed is what was given; the defaults are PreprocessConfig's
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", help="folder with metadata.jsonl or .csv, or clip.mp4 beside clip.txt; a .jsonl or .csv"
    )
    source.add_argument("--prompts", help="text with one prompt a line, .jsonl or .csv: a cache without latents")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="make nothing: say what becomes of every file of --data")
    instead.add_argument("--verify", type=int, metavar="K", help="make K random samples of a cache again and compare")
    parser.add_argument("--model", help='pipeline in diffusers layout: folder, hub id, or "tiny-wan"')
    parser.add_argument(
        "--output", help="cache folder to make, to finish, or to verify; with --check: where the ledger goes"
    )
    parser.add_argument("--caption-key", help=f"the captions' name in a .jsonl or .csv ({', '.join(CAPTION_KEYS)})")
    parser.add_argument("--negative-prompt", help="default: Wan's own")
    parser.add_argument("--max-bad-fraction", type=float, help="more unusable files or prompts are an error (0.1)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished cache, or one made under another contract"
    )
    parser.add_argument("--device", help="default: cuda when there is one, else cpu")
    clips = parser.add_argument_group("only with --data")
    clips.add_argument("--width", type=int, help="pixels, a multiple of 16 (default 832)")
    clips.add_argument("--height", type=int, help="pixels, a multiple of 16 (default 480)")
    clips.add_argument("--num-frames", type=int, help="frames of a clip, 4n + 1 (default 81)")
    clips.add_argument("--buckets", help="instead of these, several sizes: 832x480x81,480x832x81,832x480x33")
    clips.add_argument("--spans", type=int, help="most samples made of one video, one after another (default 1)")
    clips.add_argument("--fps", type=int, help="frame rate that videos are resampled to (default 16)")
    clips.add_argument("--file-key", help=f"the paths' name in a .jsonl or .csv ({', '.join(FILE_KEYS)})")
    default = VideoLimits()
    clips.add_argument("--max-bytes", type=int, help=f"largest file read ({default.max_bytes})")
    clips.add_argument("--max-seconds", type=float, help=f"longest video read ({default.max_seconds:g})")
    clips.add_argument("--max-pixels", type=int, help=f"largest frame read ({default.max_pixels})")
    clips.add_argument("--max-frames", type=int, help=f"most frames decoded of a file ({default.max_frames})")
    clips.add_argument(
        "--max-read-seconds", type=float, help=f"longest time that reading a file takes ({default.max_read_seconds:g})"
    )
    ledger = parser.add_argument_group("only with --check")
    ledger.add_argument("--batch-size", type=int, help="training.global_batch_size, to count batches (default 1)")
    ledger.add_argument(
        "--max-loss-share", type=float, help="a larger unused share of clips or seconds is an error (0.1)"
    )
    ledger.add_argument(
        "--contact-sheet", action="store_true", help="pictures of the videos' first frames, into --output"
    )
    args = vars(parser.parse_args())
    check_options(args)
    check, verify = args.pop("check", False), args.pop("verify", None)
    loss = {"batch_size": 1, "max_loss_share": 0.1, "contact_sheet": False}
    loss = {name: args.pop(name, default) for name, default in loss.items()}
    limits = {limit.name: args.pop(limit.name) for limit in dataclasses.fields(VideoLimits) if limit.name in args}
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if distributed:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for the slowest shard
        if torch.cuda.is_available():
            args["device"] = args.get("device") or f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        cfg = PreprocessConfig(**{"data": "", "model": "", "output": "", **args}, limits=VideoLimits(**limits))
        if check:
            from fvtitan.data.ledger import check_data

            check_data(cfg, **loss)
        elif verify is not None:
            from fvtitan.data.verify import verify_cache

            verify_cache(cfg, verify)
        else:
            preprocess(cfg)
    finally:
        if distributed:
            close_distributed()


if __name__ == "__main__":
    cli(main)
