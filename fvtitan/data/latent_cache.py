"""The latent cache: what training reads instead of videos, text encoders and VAEs. Written by `fvtitan.preprocess`.

manifest.json            versions, contract (encoders and their hashes, size, rate), shards, fingerprint; written last
shard-00000.safetensors  up to 64 samples: `latents.<row>` bf16 [T, C, H, W]; `text.<hash>` bf16 [L, D], true length; a
                         checksum of each, compared at every read
samples.jsonl            one line a sample: id, caption, shape, where it lies, hash of its source
skipped.jsonl            one line a file (or prompt) that was not used, and why
shard-00000...jsonl      the shard's part of the two, by which an interrupted run knows that the shard is whole
prompts.safetensors      `empty` and `negative`: the embeddings of the unconditional prompts

A prompt-only cache, for methods that train without videos, has no `latents.<row>`: a sample's shape is its embedding's, its
source the prompt, and the contract's size is null.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from fvtitan.components.files import inside, open_safetensors
from fvtitan.errors import UserError, shortened

FORMAT_VERSION = 1
GEOMETRY = {"num_frames", "height", "width", "fps"}  # of the contract's size, when it is one
REBUILD = (
    "make it again with `python -m fvtitan.preprocess --data DIR (or --prompts FILE) --model PIPELINE --output CACHE "
    "--overwrite`"
)


def text_key(caption: str) -> str:
    """The name under which a shard holds a caption's embedding."""
    return "text." + hashlib.sha256(caption.encode()).hexdigest()[:24]


def fingerprint(contract: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Identity of a cache's content, whoever made it with however many processes."""
    content = {
        "encoders": contract["encoders"],
        "size": contract["size"],
        "samples": [[s["sample_id"], s["caption"], s["source_sha256"]] for s in samples],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Only a newline ends a line: captions may hold U+2028 and its like."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, its shape and dtype, and what it is called."""
    described = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy(), zlib.crc32(described))


def shard_bytes(name: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The content of the safetensors file `name`, which holds checksums; equal for equal tensors."""
    checksums = {key: checksum(f"{name}/{key}", tensor) for key, tensor in sorted(tensors.items())}
    return save(dict(tensors), metadata={"checksums": json.dumps(checksums)})


class ShardFiles:
    """The safetensors files of a folder, opened once by every process that reads: handles do not travel to workers.

    Raises `UserError` for a name that leaves the folder, by itself or as a link; safetensors' and the system's errors come as
    they are, and a `SafetensorError` for a tensor that is not what `shard_bytes` wrote. A file without checksums is read as it
    is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._checksums: dict[str, dict[str, int] | None] = {}
        self._pid = os.getpid()

    def open(self, name: str) -> Any:
        if self._pid != os.getpid():  # in a forked worker
            self._handles, self._pid = {}, os.getpid()
        if name not in self._handles:
            if not inside(self.folder, name):
                raise UserError(f"{self.folder}: the shard name {name!r} leaves the folder")
            self._handles[name] = open_safetensors(self.folder / name)
        return self._handles[name]

    def read(self, name: str, key: str) -> Tensor:
        """A tensor of a file, checked."""
        stored = self.open(name)
        tensor = stored.get_tensor(key)
        if name not in self._checksums:
            self._checksums[name] = _read_checksums(stored.metadata())
        checksums = self._checksums[name]
        if checksums is not None and checksums.get(key) != checksum(f"{name}/{key}", tensor):
            raise SafetensorError(f"{key} has changed since it was written (its checksum differs)")
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


def _read_checksums(metadata: Mapping[str, str] | None) -> dict[str, int] | None:
    """By key; None in files of an earlier version."""
    try:
        checksums = None if metadata is None else json.loads(metadata["checksums"])
    except (KeyError, ValueError, RecursionError):
        checksums = ""
    if checksums is not None and not isinstance(checksums, dict):
        raise SafetensorError("its checksums cannot be read")
    return checksums


class LatentCache(Dataset):
    """Map-style dataset over a latent cache, memory-mapped.

    `cache[i]` is `{"sample_id", "caption", "latents": bf16 [T, C, H, W], "prompt_embeds": bf16 [L, D]}`, without "latents" in
    a cache of prompts or with `prompts_only` (`has_latents` is false), which is one bucket. Damage that can be seen without
    reading everything (missing or resized files, broken headers, missing samples) is found when it is opened.
    Raises `UserError` naming the file and the way out.
    """

    def __init__(self, path: str | Path, *, prompts_only: bool = False):
        self.path = Path(path)
        self.manifest = self._read_manifest()
        self.fingerprint: str = self.manifest["fingerprint"]
        try:
            self.samples = read_jsonl(self.path / "samples.jsonl")
            written = hashlib.sha256((self.path / "samples.jsonl").read_bytes()).hexdigest()
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(self.path / "samples.jsonl", error) from None
        if not self.samples:
            raise UserError(f"the cache {self.path} has no samples; {self.path / 'skipped.jsonl'} says why")
        if len(self.samples) != self.manifest["num_samples"]:
            raise UserError(
                f"{self.path / 'samples.jsonl'} has {len(self.samples)} samples, the manifest says "
                f"{shortened(self.manifest['num_samples'])}: {REBUILD}"
            )
        for number, sample in enumerate(self.samples, 1):
            _check_sample(sample, f"{self.path / 'samples.jsonl'} is damaged: line {number}")
        written_for = fingerprint(self.manifest["contract"], self.samples)
        if self.fingerprint != written_for or self.manifest.get("samples_sha256", written) != written:
            raise UserError(f"{self.path / 'samples.jsonl'} is not the list the manifest was written for: {REBUILD}")
        self.has_latents: bool = self.manifest["contract"]["size"] is not None and not prompts_only
        self._files = ShardFiles(self.path)
        path = self.path / "prompts.safetensors"
        try:
            for name in ("empty", "negative"):
                self._check_text(path, name, self._files.open(path.name).get_slice(name))
            prompts = [self._files.read(path.name, name) for name in ("empty", "negative")]
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from None
        self.empty_prompt_embeds, self.negative_prompt_embeds = prompts
        self._text_width = self.empty_prompt_embeds.shape[1]
        self._check_shards()
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, sample in enumerate(self.samples):
            shapes.setdefault(tuple(sample["shape"]) if self.has_latents else (), []).append(index)
        self.bucket_shapes = sorted(shapes)
        self.bucket_indices = [shapes[shape] for shape in self.bucket_shapes]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        keys = {"latents": sample["key"]} if self.has_latents else {}
        keys["prompt_embeds"] = text_key(sample["caption"])
        try:
            tensors = {name: self._files.read(sample["shard"], key) for name, key in keys.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path / sample['shard']}: sample {sample['sample_id']!r}: {shortened(error)}: {REBUILD}"
            ) from None
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{self.path / sample['shard']}: {name} of sample {sample['sample_id']!r} hold NaN or Inf: {REBUILD}"
                )
        return {"sample_id": sample["sample_id"], "caption": sample["caption"], **tensors}

    def sample_id(self, index: int) -> str:
        return self.samples[index]["sample_id"]

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            started = (self.path / "contract.json").is_file()
            state = "is not a latent cache (no manifest.json)" if self.path.exists() else "does not exist"
            state = "is not finished (no manifest.json)" if started else state
            raise UserError(
                f"data.path: the cache {self.path} {state}: "
                "`python -m fvtitan.preprocess --data DIR (or --prompts FILE) --model PIPELINE --output CACHE` makes one"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(path, error) from None
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format {shortened(repr(version))}, this version reads {FORMAT_VERSION}: {REBUILD}"
            )
        missing = {"fingerprint", "num_samples", "shards", "contract"} - set(manifest)
        if missing:
            raise UserError(f"{path}: {', '.join(sorted(missing))} missing: {REBUILD}")
        contract = manifest["contract"] if isinstance(manifest["contract"], dict) else {}
        size = contract.get("size", "")
        whole = size is None or (isinstance(size, dict) and GEOMETRY <= size.keys())  # None: a cache of prompts
        if isinstance(size, dict) and "buckets" in size:
            buckets = size["buckets"]
            whole = "fps" in size and isinstance(buckets, list) and all(isinstance(b, str) for b in buckets)
        if not (whole and "encoders" in contract and isinstance(manifest["shards"], dict)):
            raise _damaged(path, "contract.encoders, contract.size or shards are not what is written there")
        return manifest

    def _check_text(self, path: Path, name: str, stored: Any, width: int | None = None) -> None:
        """From a header: an embedding is bf16 [L, D], with the D of all the others."""
        shape, dtype = stored.get_shape(), stored.get_dtype()
        if dtype != "BF16" or len(shape) != 2 or (width is not None and shape[1] != width):
            raise UserError(f"{path}: {name} is {dtype} {shape}, need BF16 [L, {width or 'D'}]: {REBUILD}")

    def _check_shards(self) -> None:
        """Sizes and headers of all shards against the manifest and the samples."""
        needed: dict[str, list[dict[str, Any]]] = {}
        for sample in self.samples:
            needed.setdefault(sample["shard"], []).append(sample)
        for name, samples in needed.items():
            path = self.path / shortened(name)
            if name not in self.manifest["shards"]:
                raise _damaged(self.path / "manifest.json", f"it lacks the shard {path.name!r}")
            size = path.stat().st_size if path.is_file() else None
            expected = self.manifest["shards"][name]
            if size != expected:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path} {found}, the manifest says {shortened(expected)}: {REBUILD}")
            try:
                shard = self._files.open(name)
                present = set(shard.keys())
                missing = {key for s in samples for key in (s["key"], text_key(s["caption"]))} - present
                if missing:
                    raise UserError(f"{path} lacks {shortened(repr(min(missing)))}: {REBUILD}")
                for sample in samples:
                    stored = shard.get_slice(sample["key"])
                    shape, dtype = stored.get_shape(), stored.get_dtype()
                    if shape != sample["shape"] or dtype != "BF16":
                        raise UserError(
                            f"{path}: sample {sample['sample_id']!r} is {dtype} {shape}, samples.jsonl says BF16 "
                            f"{shortened(sample['shape'])}: {REBUILD}"
                        )
                    text = shard.get_slice(text_key(sample["caption"]))
                    self._check_text(path, f"the text of sample {sample['sample_id']!r}", text, self._text_width)
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is damaged ({shortened(reason)}): {REBUILD}")


def _check_sample(sample: Any, where: str) -> None:
    """Raise `UserError` when a line of samples.jsonl is not a sample."""
    for key in ("sample_id", "caption", "shard", "key", "shape", "source_sha256"):
        if not isinstance(sample, dict) or key not in sample:
            raise UserError(f"{where} lacks {key!r}: {REBUILD}")
        kind = list if key == "shape" else str
        if not isinstance(sample[key], kind) or (kind is list and not all(type(n) is int for n in sample[key])):
            raise UserError(f"{where}: {key} is {shortened(repr(sample[key]))}: {REBUILD}")


def check_cache_geometry(cache: LatentCache, *, num_frames: int, height: int, width: int, fps: int) -> None:
    """Raise `UserError` when the clips of a cache that has latents are not of the size that [data] says; of several sizes, when
    none is: it is the one that validation samples."""
    size = cache.manifest["contract"]["size"]
    if "buckets" in size:
        if f"{width}x{height}x{num_frames}" not in size["buckets"]:
            raise UserError(
                f"data.width, height and num_frames are {width}x{height}x{num_frames}, which is no bucket of the cache "
                f"{cache.path}: give one of {', '.join(size['buckets'])}, the one that validation samples"
            )
        size = {"num_frames": num_frames, "height": height, "width": width, "fps": size["fps"]}
    for key, value in (("num_frames", num_frames), ("height", height), ("width", width), ("fps", fps)):
        if size[key] != value:
            raise UserError(f"data.{key} = {value}, but the cache {cache.path} was made with {key} = {size[key]}")


def stack_text(embeds: list[Tensor]) -> dict[str, Tensor]:
    """`{"empty", "negative"}` for prompts.safetensors from the two embeddings, in this order."""
    return {"empty": embeds[0].to(torch.bfloat16).cpu(), "negative": embeds[1].to(torch.bfloat16).cpu()}
