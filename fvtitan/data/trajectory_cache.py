"""The trajectory cache: what knowledge distillation regresses onto. Written by `fvtitan.trajectories`.

contract.json            everything that determines the content; a cache is never mixed with one made otherwise
samples/000000.safetensors   while it grows: one file a sample, so that an interruption costs only the sample in flight
shard-00000.safetensors  when it is complete: `000000.states` [K, T, C, H, W] and `000000.x0` [T, C, H, W] of many samples
manifest.json            how many samples there are, shards and their sizes; written last

Sample j is the teacher's ODE trajectory for prompt `j mod number of prompts` from the noise of stream (seed, j): the same
whoever makes it, in any order. Texts stay in the cache of prompts or videos that `data.path` names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from fvtitan.components.files import inside, is_temporary, write_atomic
from fvtitan.data.latent_cache import LatentCache, ShardFiles, shard_bytes
from fvtitan.errors import UserError, shortened

FORMAT_VERSION = 1
SHARD_BYTES, SHARD_SAMPLES = 2**30, 64
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # safetensors' names


class TrajectoryFolder:
    """The files of a trajectory cache under one contract.

    Raises `UserError` when the folder holds something else, or a cache made under another contract, naming the first field
    that differs; `ignore` are fields that nobody here can know.
    """

    def __init__(self, path: str | Path, contract: Mapping[str, Any], *, ignore: Collection[str] = ()):
        self.path = Path(path)
        self.contract = json.loads(json.dumps(dict(contract)))
        recorded = _read_json(self.path / "contract.json")
        if recorded is None:
            if self.path.exists() and (not self.path.is_dir() or not all(map(_is_ours, self.path.iterdir()))):
                raise UserError(
                    f"method.teacher_path_cache = {str(path)!r} exists and is not a trajectory cache: use another"
                )
        else:
            for key in sorted((recorded.keys() | self.contract.keys()) - set(ignore)):
                if recorded.get(key) != self.contract.get(key):
                    raise UserError(
                        f"method.teacher_path_cache = {str(path)!r} was made under another contract: {key} is "
                        f"{shortened(repr(recorded.get(key)))} there and {self.contract.get(key)!r} in this run; use another "
                        "folder"
                    )
            self.contract |= {key: recorded[key] for key in ignore if key in recorded}
        states, shape = len(self.contract["timesteps"]), self.contract["shape"]
        item = torch.empty(0, dtype=self.dtype).element_size()
        sample_bytes = (states + 1) * torch.Size(shape).numel() * item
        self.shard_samples = max(1, min(SHARD_SAMPLES, SHARD_BYTES // sample_bytes))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.contract["dtype"])

    def begin(self) -> None:
        """Make the folder ours, and clear what a killed run left half-written."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "contract.json").is_file():
            write_atomic(self.path / "contract.json", json.dumps(self.contract, indent=2) + "\n")
        (self.path / "samples").mkdir(exist_ok=True)
        for folder in (self.path, self.path / "samples"):
            for temporary in folder.glob(".*.tmp"):
                temporary.unlink()

    def sample_path(self, index: int) -> Path:
        return self.path / "samples" / f"{index:06d}.safetensors"

    def write_sample(self, index: int, states: Tensor, x0: Tensor) -> None:
        """states `[K, T, C, H, W]`, x0 `[T, C, H, W]`."""
        path, tensors = self.sample_path(index), {"states": states, "x0": x0}
        tensors = {key: tensor.to(self.dtype).cpu().contiguous() for key, tensor in tensors.items()}
        write_atomic(path, shard_bytes(path.name, tensors))

    def _has_sample(self, index: int) -> bool:
        """Whether a sample's own file is whole: safetensors compares its size with its header."""
        try:
            with safe_open(self.sample_path(index), framework="pt") as stored:
                return {"states", "x0"} <= set(stored.keys())
        except (SafetensorError, OSError):
            return False

    def shards(self, num_samples: int) -> dict[str, range]:
        """The samples in each shard of a cache of `num_samples`."""
        starts = range(0, num_samples, self.shard_samples)
        return {
            f"shard-{number:05d}.safetensors": range(start, min(start + self.shard_samples, num_samples))
            for number, start in enumerate(starts)
        }

    def missing(self, num_samples: int) -> list[int]:
        """The samples of the first `num_samples` that no whole file holds."""
        absent: list[int] = []
        for name, indices in self.shards(num_samples).items():
            packed = self._packed(name)
            absent += [i for i in indices if i not in packed and not self._has_sample(i)]
        return absent

    def _packed(self, name: str) -> set[int]:
        """The samples that a shard holds, if it is whole."""
        try:
            with safe_open(self.path / name, framework="pt") as stored:
                return {int(key.split(".")[0]) for key in stored.keys() if key.endswith(".states")}
        except (SafetensorError, OSError, ValueError):
            return set()

    def pack(self, name: str, indices: range) -> None:
        """Gather samples into a shard; what an earlier, shorter one holds is kept. Raises `UserError` for a sample that is
        not what was written."""
        packed = self._packed(name)
        if packed >= set(indices):
            return
        tensors: dict[str, Tensor] = {}
        for index in indices:
            source, prefix = (self.path / name, f"{index:06d}.") if index in packed else (self.sample_path(index), "")
            files = ShardFiles(source.parent)
            try:
                tensors |= {f"{index:06d}.{key}": files.read(source.name, f"{prefix}{key}") for key in ("states", "x0")}
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{source}: sample {index}: {shortened(error)}: remove the file to make it again"
                ) from None
        write_atomic(self.path / name, shard_bytes(name, tensors))

    def commit(self, num_samples: int) -> None:
        """All shards are there: remove the own files of the samples in them, and say so."""
        for index in range(num_samples):
            self.sample_path(index).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # samples of a larger cache that was not finished stay for it
            (self.path / "samples").rmdir()
        sizes = {name: (self.path / name).stat().st_size for name in self.shards(num_samples)}
        manifest = {"format_version": FORMAT_VERSION, "num_samples": num_samples, "shards": sizes}
        write_atomic(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _is_ours(path: Path) -> bool:
    """What a run leaves that was killed while it wrote the contract."""
    return is_temporary(path, r"contract\.json")


def num_complete(path: Path, num_samples: int) -> int:
    """How many of `num_samples` are in a complete cache: the manifest's, when its files are what it says, else 0."""
    manifest = _read_json(path / "manifest.json")
    if manifest is None:
        return 0
    version, shards, total = (manifest.get(key) for key in ("format_version", "shards", "num_samples"))
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format {shortened(repr(version))}, this version reads {FORMAT_VERSION}")
    named = isinstance(shards, dict) and all(inside(path, name) for name in shards)
    if not named or type(total) is not int or total < 0:
        raise UserError(
            f"{path / 'manifest.json'} is damaged, or its shards leave the folder: remove it to have the cache checked"
        )
    for name, size in shards.items():
        try:
            if (path / name).stat().st_size != size:
                return 0
        except (OSError, ValueError):
            return 0
    return min(num_samples, total)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        content = error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged ({shortened(content)}): remove the folder to make the cache again")
    return content


class TrajectoryCache(Dataset):
    """Map-style dataset over a complete trajectory cache, with the texts of `prompts`.

    `cache[j]` is `{"sample_id", "caption", "prompt_embeds": bf16 [L, D], "states" [K, T, C, H, W], "latents" [T, C, H, W]}`;
    `latents` is x0, `states` those at `rows` of the stored ones. Raises `UserError` when a shard does not hold what the
    contract says, by its header.
    """

    def __init__(self, folder: TrajectoryFolder, num_samples: int, prompts: LatentCache, rows: list[int]):
        self.folder, self.num_samples, self.prompts, self.rows = folder, num_samples, prompts, rows
        self.fingerprint = f"{num_samples} of {json.dumps(folder.contract, sort_keys=True)}"
        self.bucket_indices = [range(num_samples)]
        self.empty_prompt_embeds = prompts.empty_prompt_embeds
        self.negative_prompt_embeds = prompts.negative_prompt_embeds
        self.has_latents = True
        self._files = ShardFiles(folder.path)
        self._check_shards()

    def _check_shards(self) -> None:
        shape = self.folder.contract["shape"]
        expected = {"states": [len(self.folder.contract["timesteps"]), *shape], "x0": shape}
        for name, indices in self.folder.shards(self.num_samples).items():
            path = self.folder.path / name
            try:
                shard = self._files.open(name)
                for index in indices:
                    for key, wanted in expected.items():
                        stored = shard.get_slice(f"{index:06d}.{key}")
                        found, dtype = stored.get_shape(), DTYPES.get(stored.get_dtype())
                        if found != wanted or dtype != self.folder.dtype:
                            raise UserError(
                                f"{path}: {key} of sample {index} is {stored.get_dtype()} {found}, the contract says "
                                f"{self.folder.contract['dtype']} {wanted}: remove the folder to make the cache again"
                            )
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}): remove the folder to make the cache again") from None

    def __len__(self) -> int:
        return self.num_samples

    def sample_id(self, index: int) -> str:
        return f"{self.prompts.sample_id(index % len(self.prompts))}#{index // len(self.prompts)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt = self.prompts[index % len(self.prompts)]
        name = f"shard-{index // self.folder.shard_samples:05d}.safetensors"
        try:
            states, x0 = (self._files.read(name, f"{index:06d}.{key}") for key in ("states", "x0"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder.path / name}: sample {index}: {shortened(error)}") from None
        shape, stored = self.folder.contract["shape"], len(self.folder.contract["timesteps"])
        if [*x0.shape] != shape or [*states.shape] != [stored, *shape]:
            raise UserError(
                f"{self.folder.path / name}: sample {index} is {[*states.shape]} and {[*x0.shape]}, the contract says "
                f"{[stored, *shape]} and {shape}"
            )
        if not (states.isfinite().all() and x0.isfinite().all()):
            raise UserError(f"{self.folder.path / name}: sample {index} holds NaN or Inf")
        return {**prompt, "sample_id": self.sample_id(index), "states": states[self.rows], "latents": x0}
