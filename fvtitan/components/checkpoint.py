"""Checkpoints that are whole or invisible.

    <folder>/step-<N>/  __<rank>_<i>.distcp, .metadata   every tensor, by torch.distributed.checkpoint, sharded
                        state.json                       everything that is not a tensor
                        config.toml, versions.json, ...  extra files
                        manifest.json                    name, size and sha256 of each file above

A checkpoint is written to `step-<N>.tmp`, synced, and renamed; readers see only names `step-<digits>` whose manifest
fits. Loading verifies every byte and compares all names and shapes before it touches the first parameter. Nothing that
can execute code is unpickled.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import logging
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, Replicate

from fvtitan.components import faults
from fvtitan.components.files import fsync_path, write_atomic
from fvtitan.components.stateful import (
    ModelState,
    OptimizerState,
    RandomState,
    SchedulerState,
    Stateful,
    TrainState,
    seed_optimizer_state,
)
from fvtitan.distributed.utils import local_tensor
from fvtitan.errors import UserError

if TYPE_CHECKING:
    from fvtitan.config import CheckpointSection

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamagedCheckpoint",
    "ModelState",
    "OptimizerState",
    "RandomState",
    "SchedulerState",
    "Stateful",
    "TrainState",
    "seed_optimizer_state",
]

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"(step-(?:0|[1-9][0-9]*))(\.old)?\.tmp")
_MARKER = ".fvtitan-checkpoint"  # in every folder we made: nothing without it is ever removed
_PER_RANK = "random_state"  # may be missing or left over: ranks come and go


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are as they were."""


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was written: a file is missing, cut short or changed. Nothing was loaded."""


class Checkpointer:
    """Saves and loads `states`: dotted names (`roles.student.transformer`) to objects with a `state_dict`.

    `random_state` is each rank's own; all other plain values are taken to be equal everywhere.
    All methods but `steps`, `latest_step` and `path` are collective: every rank calls them, and an error on one rank
    is raised on all. `keep_latest_k` = 0 keeps everything. `async_mode` "async" copies the state and writes it in the
    background: call `maybe_finish()` every step and `close()` at the end, or its errors stay unseen. `timeout`: how long
    a rank waits for the others; None: torch's 30 minutes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_latest_k: int = 0,
        async_mode: Literal["disabled", "async"] = "disabled",
        timeout: datetime.timedelta | None = None,
    ) -> None:
        if keep_latest_k < 0 or keep_latest_k == 1:
            raise UserError(
                f"checkpoint.keep_latest_k = {keep_latest_k} is not allowed: 0 keeps all, otherwise at least 2, so "
                "that a good one is left when the newest turns out damaged"
            )
        self.folder = Path(folder)
        self.keep_latest_k = keep_latest_k
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # Its own group: a write in the background must not mix its collectives with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if distributed else None
        self._loaded_from: Path | None = None
        self._pending: Future[None] | None = None
        self._stager = self._executor = None
        if async_mode == "async":
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._everywhere(f"cannot use {self.folder}", lambda: self._on_rank0(self._remove_leftovers))

    # What there is

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending: all files of the manifest are there in their full size."""
        if not self.folder.is_dir():
            return []
        names = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name and _is_complete(self.folder / name[0]))

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def find(self, section: CheckpointSection) -> Path | None:
        """What to start from: this folder (`load_step` or the latest), else `initial_load_path`, else None.

        Raises `UserError` when `load_step` or a required checkpoint is not there, `DamagedCheckpoint` when the newest
        one is incomplete: commits are atomic, so something happened to it, and going back is for the user to decide.
        """
        return self._everywhere("cannot resume", lambda: self._on_rank0(lambda: self._find(section)))[0]

    def _find(self, section: CheckpointSection) -> Path | None:
        steps = self.steps()
        if section.load_step != -1:
            if section.load_step not in steps:
                there = f"the complete ones are {', '.join(map(str, steps))}" if steps else "there is none"
                raise UserError(f"checkpoint.load_step = {section.load_step} is not in {self.folder}: {there}")
            return self.path(section.load_step)
        ours = [path for path in self.folder.glob("step-*") if _STEP.fullmatch(path.name) and (path / _MARKER).exists()]
        newest = max((int(path.name.removeprefix("step-")) for path in ours), default=-1)
        if newest > max(steps, default=-1):
            self._verify(self.path(newest))  # says what is wrong with it
        if steps:
            return self.path(steps[-1])
        if section.initial_load_path:
            return Path(section.initial_load_path)
        if section.require_resume:
            raise UserError(f"checkpoint.require_resume = true, but there is no checkpoint in {self.folder}")
        return None

    # Saving

    def save(self, step: int, states: Mapping[str, Stateful], *, extra_files: Mapping[str, str] | None = None) -> None:
        """Write `step-<step>`. The values are those at the call, in asynchronous mode too.

        Raises `CheckpointError` on every rank when one cannot write; what was written is removed.
        """
        self.wait()
        started = time.perf_counter()
        tensors, plain = _split({name: state.state_dict() for name, state in states.items()})
        extra = dict(extra_files or {})
        assert not {"state.json", "manifest.json", ".metadata"} & set(extra), "reserved file name"
        if self._stager is None:
            self._write(step, tensors, plain, extra, started)
            return
        plain = json.loads(json.dumps(plain))  # a copy: training goes on
        staged = self._stager.stage(tensors)
        self._pending = self._executor.submit(self._write, step, staged, plain, extra, started)

    def maybe_finish(self) -> None:
        """Raise the error of a background write that has ended; returns at once while it is running."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background write, if there is one, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the background write, free the staging memory and end the own process group, whose threads would
        otherwise take the GIL of an interpreter that is shutting down, which aborts the process. Call before the
        default process group is destroyed."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._stager.close()
                self._executor = self._stager = None
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _write(
        self, step: int, tensors: dict[str, Tensor], plain: dict[str, Any], extra: dict[str, str], started: float
    ) -> None:
        target = self.path(step)
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            self._everywhere(f"cannot save {target}", lambda: self._on_rank0(lambda: self._begin(temporary)))
            needed = self._everywhere(f"cannot save {target}", lambda: self._bytes(tensors))
            self._everywhere(f"cannot save {target}", lambda: self._check_space(sum(needed)))
            faults.reach("save.before_shards", step)
            with _dcp_errors(f"cannot save {target}", self.folder), _quiet():
                dcp.save(
                    tensors,
                    storage_writer=_Writer(temporary, overwrite=False),
                    planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=self._group,
                )
            faults.reach("save.before_manifest", step)
            self._commit(temporary, target, plain, extra)
        except Exception:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.rank == 0:
            size, seconds = sum(needed) / 2**20, time.perf_counter() - started
            print(f"saved checkpoint {target} ({size:.0f} MiB in {seconds:.1f} s)", flush=True)

    def _begin(self, temporary: Path) -> None:
        if temporary.exists():
            if not (temporary / _MARKER).exists():
                raise CheckpointError(f"{temporary} is in the way and is not ours; move it")
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        write_atomic(temporary / _MARKER, "written by fvtitan; without manifest.json it is incomplete\n")

    def _bytes(self, tensors: dict[str, Tensor]) -> int:
        """What this rank writes: its shards, of copies the first, and on rank 0 what is the same everywhere."""
        mine = [t for t in tensors.values() if (_is_first_copy(t) if isinstance(t, DTensor) else self.rank == 0)]
        return sum(local_tensor(t).numel() * t.element_size() for t in mine)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if self.rank == 0 and free < needed:
            raise CheckpointError(f"no space: {needed} bytes needed, {free} free in {self.folder}")

    def _commit(self, temporary: Path, target: Path, plain: dict[str, Any], extra: dict[str, str]) -> None:
        what = f"cannot commit {target}"
        parts = self._everywhere(what, lambda: plain)
        merged: dict[str, Any] = {}
        for part in parts:
            _merge(merged, part)

        def small_files() -> None:
            for name, content in {"state.json": json.dumps({"states": merged}), **extra}.items():
                write_atomic(temporary / name, content)

        self._everywhere(what, lambda: self._on_rank0(small_files))
        entries = self._everywhere(what, lambda: [_entry(file) for file in self._my_files(temporary)])

        def publish() -> None:
            files = sorted((entry for part in entries for entry in part), key=lambda entry: entry["name"])
            write_atomic(temporary / "manifest.json", json.dumps({"files": files}, indent=1))
            fsync_path(temporary)
            faults.reach("save.before_rename")
            old = target.with_name(f"{target.name}.old.tmp")
            if target.exists():  # trained again from an earlier step: the new one takes the name, then the old one goes
                target.rename(old)
            temporary.rename(target)
            fsync_path(self.folder)
            if old.exists():
                shutil.rmtree(old)

        self._everywhere(what, lambda: self._on_rank0(publish))
        faults.reach("save.before_purge")
        if self.rank == 0:
            self._retain()

    def _my_files(self, folder: Path) -> list[Path]:
        """The files that this rank hashes: its own shards, which it has just written; rank 0 the rest."""
        names = {path: re.match(r"__(\d+)_", path.name) for path in folder.iterdir()}
        return [path for path, shard in names.items() if (int(shard[1]) if shard else 0) == self.rank]

    def _retain(self) -> None:
        """Remove the oldest beyond `keep_latest_k`, but never the one that this run was resumed from."""
        if self.keep_latest_k == 0:
            return
        for step in self.steps()[: -self.keep_latest_k]:
            path = self.path(step)
            if self._loaded_from == path.resolve() or not (path / _MARKER).exists():
                continue
            try:
                doomed = path.rename(path.with_name(f"{path.name}.tmp"))  # invisible first: it goes as a whole
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("could not remove the old checkpoint %s: %s", path, error)

    def _remove_leftovers(self) -> None:
        """Clear what a killed run left half-written; a checkpoint that was about to be replaced gets its name back."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            name = _TEMPORARY.fullmatch(path.name)
            if not name or not (path / _MARKER).exists():
                continue
            target = self.folder / name[1]
            if name[2] and not target.exists() and _is_complete(path):
                path.rename(target)
                continue
            print(f"removing the incomplete checkpoint {path}", flush=True)
            shutil.rmtree(path)

    # Loading

    def load(
        self,
        source: int | str | Path,
        states: Mapping[str, Stateful],
        *,
        allow_missing: Collection[str] = (),
        allow_unexpected: Collection[str] = (),
        allow_cast: bool = False,
    ) -> Path:
        """Load a step of this folder, or a checkpoint folder anywhere. Returns the path it came from.

        `allow_missing`: name prefixes of states that the checkpoint may lack; such a state is left as it is, as a
        whole. `allow_unexpected`: prefixes of what the checkpoint may hold beyond `states` ("" for anything).
        `random_state` may always differ. `allow_cast` permits other dtypes than the saved ones.

        Raises `DamagedCheckpoint` when a file is not what was written, and `UserError` when names, shapes or dtypes
        differ, before any state is touched.
        """
        path = self.path(source) if isinstance(source, int) else Path(source)
        what = f"cannot load {path}"
        files = self._everywhere(what, lambda: self._verify(path))[self.rank]
        saved_tensors, saved_plain = self._everywhere(what, lambda: _read_index(path, files), share=False)

        def plan() -> tuple[list[str], dict[str, Any], dict[str, Tensor]]:
            names, templates, tensors = _match(states, saved_tensors, saved_plain, allow_missing)
            _compare(tensors, saved_tensors, names, saved_plain, allow_unexpected, allow_cast)
            return names, templates, tensors

        names, templates, tensors = self._everywhere(what, plan, share=False)
        for name in sorted(set(states) - set(names)):
            logger.warning("%s is not in %s: it starts anew", name, path)
        with _dcp_errors(what, path), _quiet():
            dcp.load(
                tensors,
                storage_reader=_Reader(path, files),
                planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
            )

        def restore() -> None:
            for name in names:
                states[name].load_state_dict(_join(templates[name], saved_plain[name], f"{name}.", tensors))

        self._everywhere(what, restore)
        self._loaded_from = path.resolve()
        return path

    def _verify(self, path: Path) -> set[str]:
        """The names in the manifest, after checking all sizes and this rank's share of the hashes."""
        files = _read_manifest(path)
        for number, (name, (size, digest)) in enumerate(sorted(files.items())):
            actual = (path / name).stat().st_size if (path / name).is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes"
                self._damaged(path, f"{name} {found}, written were {size}")
            if number % self.world_size == self.rank and _sha256(path / name) != digest:
                self._damaged(path, f"{name} has changed since it was written (sha256 differs)")
        return set(files)

    def _damaged(self, path: Path, reason: str) -> NoReturn:
        others = [str(step) for step in self.steps() if self.path(step) != path]
        hint = f"set checkpoint.load_step to one of: {', '.join(others)}" if others else "there is no other one"
        raise DamagedCheckpoint(f"damaged checkpoint {path}: {reason}; {hint}")

    # Acting together

    def _everywhere(self, what: str, action: Callable[[], Any], *, share: bool = True) -> Any:
        """Run `action` on every rank; if it fails on one, fail on all. Returns all results, or only the own one."""
        result = failure = None
        try:
            result = action()
        except Exception as error:
            failure = error
        mine = (_portable(failure), result if share and failure is None else None)
        gathered = [mine]
        if self._group is not None:
            gathered = [None] * self.world_size
            dist.all_gather_object(gathered, mine, group=self._group)
        for rank, (failed, _) in enumerate(gathered):
            if failed:
                kind, message = failed
                where = f" (rank {rank})" if self.world_size > 1 and not issubclass(kind, UserError) else ""
                raise kind(message if issubclass(kind, DamagedCheckpoint) else f"{what}{where}: {message}") from failure
        return [other for _, other in gathered] if share else result

    def _on_rank0(self, action: Callable[[], Any]) -> Any:
        return action() if self.rank == 0 else None


def _portable(error: Exception | None) -> tuple[type[Exception], str] | None:
    """The kind and message to raise on all ranks. Errors of the system become `CheckpointError`."""
    if error is None:
        return None
    if isinstance(error, UserError | CheckpointError):
        return type(error), str(error)
    return CheckpointError, f"{type(error).__name__}: {error}"


# States <-> flat tensors and JSON


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether no lower rank of its mesh holds the same shard: DCP writes one of them."""
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(place == 0 for place, placement in places if isinstance(placement, Replicate))


def _split(states: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under flat keys `<name>.<key>...`, and the rest as one JSON tree by name."""
    tensors: dict[str, Tensor] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        rest = {}
        for key, value in tree.items():
            assert isinstance(key, str), f"{prefix}{key}: JSON would turn this key into a string"
            if isinstance(value, Tensor):
                assert prefix + key not in tensors, f"two tensors are called {prefix + key}"
                tensors[prefix + key] = value.detach()
            elif isinstance(value, Mapping):
                rest[key] = walk(value, f"{prefix}{key}.")
            else:
                rest[key] = value
        return rest

    return tensors, {name: walk(state, f"{name}.") for name, state in states.items()}


def _join(template: Mapping[str, Any], plain: Any, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The saved state: tensors in the places of the template's, everything else as it was saved."""
    state = dict(plain)
    for key, value in template.items():
        if isinstance(value, Tensor):
            state[key] = tensors[prefix + key]
        elif isinstance(value, Mapping):
            state[key] = _join(value, plain.get(key, {}), f"{prefix}{key}.", tensors)
    return state


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add what another rank has alone; what is there already (rank 0's) stays."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into.setdefault(key, value)


def _under(name: str, prefixes: Collection[str]) -> bool:
    return any(prefix == "" or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _match(
    states: Mapping[str, Stateful],
    saved_tensors: Mapping[str, metadata.TensorStorageMetadata],
    saved_plain: Mapping[str, Any],
    allow_missing: Collection[str],
) -> tuple[list[str], dict[str, Any], dict[str, Tensor]]:
    """The states to load, their templates, and the tensors to read into."""
    missing = [name for name in states if name not in saved_plain]
    refused = [name for name in missing if not _under(name, [_PER_RANK]) and not _under(name, allow_missing)]
    if refused:
        raise UserError(
            f"the checkpoint lacks {_listed(refused)}; it holds {_listed(saved_plain)}. "
            "Allow it by name, or start from a checkpoint that has it"
        )
    names, templates, tensors = [], {}, {}
    for name, state in states.items():
        if name in missing:
            continue
        get = getattr(state, "load_template", None)
        template = get(saved_plain[name]) if get else state.state_dict()
        wanted, _ = _split({name: template})
        if _under(name, [_PER_RANK]) and not wanted.keys() <= saved_tensors.keys():
            continue  # saved on another kind of device
        names.append(name)
        templates[name] = template
        tensors |= wanted
    return names, templates, tensors


def _compare(
    wanted: Mapping[str, Tensor],
    saved: Mapping[str, metadata.TensorStorageMetadata],
    names: Collection[str],
    saved_plain: Mapping[str, Any],
    allow_unexpected: Collection[str],
    allow_cast: bool,
) -> None:
    missing = [key for key in wanted if key not in saved]
    extra_states = [name for name in saved_plain if name not in names]
    unexpected = [
        key
        for key in [*saved, *(name for name in extra_states if not any(k.startswith(f"{name}.") for k in saved))]
        if key not in wanted and not _under(key, [_PER_RANK]) and not _under(key, allow_unexpected)
    ]
    differing = []
    for key, tensor in wanted.items():
        if key not in saved:
            continue
        here, there = tuple(tensor.shape), tuple(saved[key].size)
        if here != there:
            differing.append(f"{key} {list(there)} saved, {list(here)} here")
        elif tensor.dtype != saved[key].properties.dtype and not allow_cast:
            differing.append(f"{key} {saved[key].properties.dtype} saved, {tensor.dtype} here")
    problems = [
        f"{len(keys)} {title}: {_listed(keys)}"
        for title, keys in (
            ("missing in the checkpoint", missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape or dtype", differing),
        )
        if keys
    ]
    if problems:
        raise UserError(f"the checkpoint does not fit this run. {'; '.join(problems)}")


def _listed(names: Collection[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# Files


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (size, sha256). Raises `DamagedCheckpoint`, or `UserError` when there is no checkpoint at all."""
    if not path.is_dir():
        raise UserError("there is no checkpoint")
    try:
        entries = json.loads((path / "manifest.json").read_bytes())["files"]
        files = {str(e["name"]): (int(e["size"]), str(e["sha256"])) for e in entries}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} has no manifest.json: it is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"damaged checkpoint {path}: manifest.json cannot be read ({error})") from None
    if bad := [name for name in files if Path(name).name != name]:
        raise DamagedCheckpoint(f"damaged checkpoint {path}: manifest.json names files elsewhere: {bad[0]!r}")
    if lacking := {".metadata", "state.json"} - files.keys():
        raise DamagedCheckpoint(f"damaged checkpoint {path}: manifest.json lacks {', '.join(sorted(lacking))}")
    return files


def read_tensor_names(path: str | Path, prefix: str) -> list[str]:
    """The names below `prefix` of one state's tensors; [] when the checkpoint holds no such state."""
    saved, _ = _read_index(Path(path), _read_manifest(Path(path)))
    return [key.removeprefix(f"{prefix}.") for key in saved if key.startswith(f"{prefix}.")]


def verify_files(path: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest. Raises `UserError` when there is none, `DamagedCheckpoint` when a
    file is not what was written."""
    path = Path(path)
    for name, (size, digest) in _read_manifest(path).items():
        if not (path / name).is_file() or (path / name).stat().st_size != size or _sha256(path / name) != digest:
            raise DamagedCheckpoint(f"damaged checkpoint {path}: {name} is missing or has changed since it was written")


def read_tensors(
    path: str | Path, prefix: str, names: Collection[str] | None = None, *, verify: bool = True
) -> dict[str, Tensor]:
    """The tensors of one state (`roles.student.transformer`, `ema.student`), full, by the names below `prefix`, or those of
    `names`; {} when the checkpoint holds no such state. For one process that needs no run: scoring, building, exporting.

    Raises as `verify_files`, which it calls first unless the caller has done so (`verify` = False).
    """
    path = Path(path)
    if verify:
        verify_files(path)
    files = _read_manifest(path)
    saved, _ = _read_index(path, files)
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in saved.items()
        if key.startswith(f"{prefix}.") and (names is None or key.removeprefix(f"{prefix}.") in names)
    }
    if wanted:
        with _dcp_errors(f"cannot read {path}", path), _quiet():
            dcp.load(
                wanted,
                storage_reader=_Reader(path, files),
                planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in wanted.items()}


def _is_complete(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == size for name, (size, _) in _read_manifest(path).items())
    except (UserError, FileNotFoundError):
        return False


def _read_index(path: Path, files: Collection[str]) -> tuple[dict[str, metadata.TensorStorageMetadata], dict[str, Any]]:
    """What the checkpoint holds: tensors by key with shape and dtype, and the JSON part by state."""
    index = _Reader(path, files).read_metadata()
    return index.state_dict_metadata, json.loads((path / "state.json").read_bytes())["states"]


# torch.distributed.checkpoint, without its unpickling of arbitrary objects


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        faults.reach("save.shards")
        return written

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # the original holds this machine's absolute path


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
            tensors = index.state_dict_metadata.values()
            places = {info.relative_path for info in index.storage_data.values()}
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise DamagedCheckpoint(f"refused {self._root / '.metadata'}: {error}") from None
        if not all(isinstance(tensor, metadata.TensorStorageMetadata) for tensor in tensors):
            raise DamagedCheckpoint(f"refused {self._root / '.metadata'}: it holds objects other than tensors")
        if foreign := places - set(self._files):
            raise DamagedCheckpoint(f"refused {self._root / '.metadata'}: it points to {sorted(foreign)[0]!r}")
        return index


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise DamagedCheckpoint("the checkpoint holds a pickled object")


@contextmanager
def _dcp_errors(what: str, folder: Path) -> Iterator[None]:
    """CheckpointException is a BaseException with stack traces of all ranks: make it one ordinary, short error."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        free = shutil.disk_usage(folder).free
        message = f"{what} (rank {rank}): {type(cause).__name__}: {cause} [{free} bytes free in {folder}]"
        raise CheckpointError(message) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
