"""What a checkpoint folder is: named, verified and read, with or without a run.

    step-<N>/   __<rank>_<i>.distcp, .metadata   every tensor, by torch.distributed.checkpoint, sharded
                state.json                       everything that is not a tensor
                config.toml, versions.json, ...  extra files
                manifest.json                    name, size and sha256 of each file above

Readers trust only files that the manifest names and that are what it says. Nothing that can execute code is unpickled.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from fvtitan.components.files import file_sha256
from fvtitan.distributed.utils import on_every_rank, rank_and_world
from fvtitan.errors import EXIT_DISK_FULL, UserError, is_disk_full, shortened


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are as they were."""


class DiskFull(CheckpointError):
    """There is no room for a checkpoint or an export. The message names the path, the bytes needed and those free."""

    exit_status = EXIT_DISK_FULL


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was written: a file is missing, cut short or changed. Nothing was loaded."""


def file_entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (size, sha256). Raises `DamagedCheckpoint`, or `UserError` when there is no checkpoint at all."""
    if not path.is_dir():
        raise UserError("there is no checkpoint")
    try:
        entries = json.loads((path / "manifest.json").read_bytes())["files"]
        files = {str(e["name"]): (int(e["size"]), str(e["sha256"])) for e in entries}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} has no manifest.json: it is not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = shortened(f"manifest.json cannot be read ({error})")
        raise DamagedCheckpoint(f"damaged checkpoint {path}: {reason}") from None
    if len(files) != len(entries):
        raise DamagedCheckpoint(f"damaged checkpoint {path}: manifest.json names a file twice")
    if bad := [name for name in files if Path(name).name != name or not name.isprintable() or len(name) > 255]:
        reason = f"manifest.json names files elsewhere: {shortened(repr(bad[0]))}"
        raise DamagedCheckpoint(f"damaged checkpoint {path}: {reason}")
    if lacking := {".metadata", "state.json"} - files.keys():
        raise DamagedCheckpoint(f"damaged checkpoint {path}: manifest.json lacks {', '.join(sorted(lacking))}")
    return files


def is_complete(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == size for name, (size, _) in read_manifest(path).items())
    except (UserError, OSError):
        return False


def verify_files(path: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest. All ranks of the process group, if there is one, call it, share the
    reading, and get the same answer: `UserError` when there is no checkpoint, `DamagedCheckpoint` when a file is not what was
    written."""
    rank, world = rank_and_world()
    on_every_rank(lambda: verify_share(Path(path), rank, world))


def verify_share(path: Path, rank: int, world_size: int) -> set[str]:
    """The names in the manifest, after checking all sizes and this rank's share of the hashes."""
    name = "manifest.json"
    try:
        files = read_manifest(path)
        for number, (name, (size, digest)) in enumerate(sorted(files.items())):
            actual = (path / name).stat().st_size if (path / name).is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise DamagedCheckpoint(f"damaged checkpoint {path}: {name} {found}, written were {size}")
            if number % world_size == rank and file_sha256(path / name) != digest:
                raise DamagedCheckpoint(
                    f"damaged checkpoint {path}: {name} has changed since it was written (sha256 differs)"
                )
    except OSError as error:  # a bad block
        raise DamagedCheckpoint(f"damaged checkpoint {path}: {name}: {error.strerror}") from None
    return set(files)


def read_index(path: Path, files: Collection[str]) -> tuple[dict[str, metadata.TensorStorageMetadata], dict[str, Any]]:
    """What the checkpoint holds: tensors by key with shape and dtype, and the JSON part by state."""
    index = _Reader(path, files).read_metadata()
    try:
        plain = json.loads((path / "state.json").read_bytes())["states"]
        if not isinstance(plain, dict) or not all(isinstance(state, dict) for state in plain.values()):
            raise TypeError("the states are not objects")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise DamagedCheckpoint(f"damaged checkpoint {path}: state.json cannot be read ({reason})") from None
    return index.state_dict_metadata, plain


def read_tensor_names(path: str | Path, prefix: str) -> list[str]:
    """The names below `prefix` of one state's tensors; [] when the checkpoint holds no such state."""
    saved, _ = read_index(Path(path), read_manifest(Path(path)))
    return [key.removeprefix(f"{prefix}.") for key in saved if key.startswith(f"{prefix}.")]


def read_tensors(
    path: str | Path, prefix: str, names: Collection[str] | None = None, *, verify: bool = True
) -> dict[str, Tensor]:
    """The tensors of one state (`roles.student.transformer`, `ema.student`), full, by the names below `prefix`, or those of
    `names`; {} when the checkpoint holds no such state. For one process that needs no run: scoring, building, exporting.

    Raises as `verify_files`, which it calls first unless the caller has done so (`verify` = False): then on all ranks.
    """
    path = Path(path)
    if verify:
        verify_files(path)
    files = read_manifest(path)
    saved, _ = read_index(path, files)
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in saved.items()
        if key.startswith(f"{prefix}.") and (names is None or key.removeprefix(f"{prefix}.") in names)
    }
    if wanted:
        read_into(wanted, path, files, f"cannot read {path}")
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in wanted.items()}


def read_into(
    tensors: dict[str, Tensor],
    path: Path,
    files: Collection[str],
    what: str,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Read into `tensors`, by key, from the `files` of the manifest: every rank of `group` its
    shards; None: this process alone.

    Raises `CheckpointError`, which begins with `what`.
    """
    with dcp_errors(what, path):
        dcp.load(
            tensors,
            storage_reader=_Reader(path, files),
            planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )


# torch.distributed.checkpoint, without its unpickling of arbitrary objects


@contextmanager
def dcp_errors(what: str, folder: Path) -> Iterator[None]:
    """CheckpointException is a BaseException with stack traces of all ranks: make it one ordinary, short error. And no warning
    that there is one process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if is_disk_full(cause):
            raise DiskFull(f"{what} (rank {rank}): {cause.strerror}") from None
        free = shutil.disk_usage(folder).free
        reason = shortened(f"{type(cause).__name__}: {cause}", 500)
        message = f"{what} (rank {rank}): {reason} [{free} bytes free in {folder}]"
        raise CheckpointError(message) from error


class _Unpickler(pickle.Unpickler):
    """Builds the plain records a `.metadata` file is made of, and refuses every other name."""

    _RECORDS = {
        (record.__module__, record.__qualname__): record
        for record in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.TensorProperties,
            metadata.ChunkStorageMetadata,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            torch.serialization._get_layout,
        )
    } | {("torch", "Size"): torch.Size}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._RECORDS:
            return self._RECORDS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class _Reader(dcp.FileSystemReader):
    """Reads only files that the manifest names, and `.metadata` with the restricted unpickler."""

    def __init__(self, path: Path, files: Collection[str]) -> None:
        super().__init__(path)
        self._root, self._files = path, files

    def read_metadata(self) -> metadata.Metadata:
        try:
            index = _Unpickler(io.BytesIO((self._root / ".metadata").read_bytes())).load()
            self._check(index)
        except Exception as error:  # a pickle can raise anything
            reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {error}"
            raise DamagedCheckpoint(
                f"damaged checkpoint {self._root}: refused .metadata: {shortened(reason)}"
            ) from None
        return index

    def _check(self, index: Any) -> None:
        """Raise `UnpicklingError` unless the index is whole and fits the files: nothing is allocated or read by it before."""

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise pickle.UnpicklingError(message)

        tensors, stored = index.state_dict_metadata, index.storage_data
        sizes = {name: (self._root / name).stat().st_size for name in self._files}
        for place, info in stored.items():
            require(isinstance(place, metadata.MetadataIndex), "it holds objects other than tensors")
            require(info.relative_path in sizes, f"it points to {info.relative_path!r}")
            inside = 0 <= info.offset and 0 < info.length <= sizes[info.relative_path] - info.offset
            require(inside and not info.transform_descriptors, f"{place.fqn} lies outside of {info.relative_path}")
        for name, tensor in tensors.items():
            require(isinstance(tensor, metadata.TensorStorageMetadata), "it holds objects other than tensors")
            shape, dtype = tensor.size, tensor.properties.dtype
            require(isinstance(shape, torch.Size) and isinstance(dtype, torch.dtype), f"{name} has no shape or dtype")
            require(shape.numel() * dtype.itemsize <= sum(sizes.values()), f"{name} is larger than the files")
            for chunk in tensor.chunks:
                fits = len(chunk.offsets) == len(chunk.sizes) == len(shape)
                parts = zip(chunk.offsets, chunk.sizes, shape, strict=True) if fits else ()
                fits = fits and all(0 <= start and 0 <= size <= whole - start for start, size, whole in parts)
                require(fits, f"{name} has a part outside of it")
                require(metadata.MetadataIndex(name, chunk.offsets) in stored, f"{name} has a part that lies nowhere")
            starts = {tuple(chunk.offsets) for chunk in tensor.chunks}
            complete = sum(chunk.sizes.numel() for chunk in tensor.chunks) == shape.numel()
            require(complete and len(starts) == len(tensor.chunks), f"{name} is not the sum of its parts")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise DamagedCheckpoint("the checkpoint holds a pickled object")
