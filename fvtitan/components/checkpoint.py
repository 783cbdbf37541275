"""Saves and resumes: checkpoints that are whole or invisible.

A checkpoint (`checkpoint_folder` has what is in one) is written to `step-<N>.tmp`, synced, and renamed; readers see only
names `step-<digits>` whose manifest fits. Loading verifies every byte and compares all names and shapes before it touches
the first parameter.

A file `keep` in a checkpoint, made by hand, keeps it from being removed; a run that goes back from a damaged one puts it
there. What a new checkpoint of the same step must not replace becomes `step-<N>.aside`.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, Replicate

from fvtitan.components import faults
from fvtitan.components.checkpoint_folder import (
    CheckpointError,
    DamagedCheckpoint,
    DiskFull,
    dcp_errors,
    file_entry,
    is_complete,
    read_index,
    read_into,
    verify_share,
)
from fvtitan.components.files import fsync_path, write_atomic
from fvtitan.components.stateful import Stateful
from fvtitan.distributed.utils import local_tensor
from fvtitan.errors import UserError, is_disk_full, listed, shortened

if TYPE_CHECKING:
    from fvtitan.config import CheckpointSection

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"(step-(?:0|[1-9][0-9]*))(\.old)?\.tmp")
_MARKER = ".fvtitan-checkpoint"  # in every folder we made: nothing without it is ever removed
_KEEP = "keep"
_PER_RANK = "random_state"  # may be missing or left over: ranks come and go


class Checkpointer:
    """Saves and loads `states`: dotted names (`roles.student.transformer`) to objects with a `state_dict`.

    `random_state` is each rank's own; all other plain values are taken to be equal everywhere.
    All methods but `steps` and `path` are collective: every rank calls them, and an error on one rank
    is raised on all. `keep_latest_k` = 0 keeps everything. `async_mode` "async" copies the state and writes it in the
    background: call `maybe_finish()` every step, and `close()` at the end or use it in `with`, or its errors stay unseen.
    `on_failed_save` "continue": a save that fails is a warning, unless it is the last one. `timeout`: how long a rank waits
    for the others; None: torch's 30 minutes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_latest_k: int = 0,
        async_mode: Literal["disabled", "async"] = "disabled",
        on_failed_save: Literal["stop", "continue"] = "stop",
        timeout: datetime.timedelta | None = None,
    ) -> None:
        if keep_latest_k < 0 or keep_latest_k == 1:
            raise UserError(
                f"checkpoint.keep_latest_k = {keep_latest_k} is not allowed: 0 keeps all, otherwise at least 2, so "
                "that a good one is left when the newest turns out damaged"
            )
        self.folder = Path(folder)
        self.keep_latest_k, self.on_failed_save = keep_latest_k, on_failed_save
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        # Its own group: a write in the background must not mix its collectives with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if distributed else None
        self._loaded_from: Path | None = None
        self._found: tuple[Path, set[str]] | None = None  # by `find`, and its files, which need no second reading
        self._good: set[Path] = set()  # committed here, or every byte read here and found as written
        self._pending: Future[None] | None = None
        self._pending_is_last = False
        self._stager = self._executor = None
        if async_mode == "async":
            self._stager = _stager()
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
        return sorted(int(name[1]) for name in names if name and is_complete(self.folder / name[0]))

    def find(self, section: CheckpointSection) -> Path | None:
        """What to start from: this folder (`load_step` or the latest), else `initial_load_path`, else None. All of it has
        been read and is as it was written.

        Commits are atomic: something has happened to a checkpoint that is not. Going back from it is for the user to
        decide; with `fallback` the newest that is whole is taken, and the others are kept.

        Raises `DamagedCheckpoint`, and `UserError` when `load_step` or a required checkpoint is not there, or when this
        folder cannot be written.
        """
        candidates = self._everywhere("cannot resume", lambda: self._on_rank0(lambda: self._candidates(section)))[0]
        fallback, damaged = section.fallback, {}
        for path in candidates:
            problem, files = self._read_all(path)
            if not problem:
                break
            if not fallback:
                self._refuse(path, problem)
            damaged[path] = problem
        else:
            if damaged:
                raise DamagedCheckpoint(f"none is whole: {'; '.join(damaged.values())}")
            return None
        if damaged and self.rank == 0:
            self._keep_damaged(damaged)
            print(f"WARNING: checkpoint.fallback = true: going back to {path}, which is whole", flush=True)
        self._found = (path, files)
        return path

    def _candidates(self, section: CheckpointSection) -> list[Path]:
        """What may be started from, best first; sizes and bytes unseen."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / ".writable", "")
            (self.folder / ".writable").unlink()
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull(f"{self.folder} cannot be written ({error.strerror})") from None
            raise UserError(f"job.dump_folder: {self.folder} cannot be written ({error.strerror})") from None
        there = self._folders(self.folder)
        if section.load_step != -1:
            if section.load_step not in there:
                found = f"there are {', '.join(map(str, there))}" if there else "there is none"
                raise UserError(f"checkpoint.load_step = {section.load_step} is not in {self.folder}: {found}")
            return [self.path(section.load_step)]
        if there:
            return [self.path(step) for step in reversed(there)]
        if section.initial_load_path:
            return [Path(section.initial_load_path)]
        if section.require_resume:
            raise UserError(f"checkpoint.require_resume = true, but there is no checkpoint in {self.folder}")
        return []

    def _folders(self, folder: Path) -> list[int]:
        """The steps whose folders are checkpoints, or were; a copy may lack the files that begin with a dot. Ascending."""
        names = [_STEP.fullmatch(path.name) for path in folder.iterdir()]
        paths = {int(name[1]): folder / name[0] for name in names if name}
        return sorted(n for n, path in paths.items() if any((path / f).exists() for f in (_MARKER, "manifest.json")))

    def _keep_damaged(self, damaged: Mapping[Path, str]) -> None:
        for path, problem in damaged.items():
            print(f"WARNING: {problem}; it is kept as it is", flush=True)
            try:
                write_atomic(path / _KEEP, f"{problem}\n")
            except OSError as error:
                logger.warning("%s cannot be written: %s", path / _KEEP, error)

    # Saving

    def save(
        self,
        step: int,
        states: Mapping[str, Stateful],
        *,
        extra_files: Mapping[str, str] | None = None,
        last: bool = False,
    ) -> None:
        """Write `step-<step>`. The values are those at the call, in asynchronous mode too. `last`: of the run.

        Raises `CheckpointError` on every rank when one cannot write, `DiskFull` for want of room; what was written is
        removed.
        """
        self.wait()
        started = time.perf_counter()
        tensors, plain = _split({name: state.state_dict() for name, state in states.items()})
        extra = dict(extra_files or {})
        assert not {"state.json", "manifest.json", ".metadata"} & set(extra), "reserved file name"
        if self._stager is None:
            with self._failure_allowed(last):
                self._write(step, tensors, plain, extra, started)
            return
        plain = json.loads(json.dumps(plain))  # a copy: training goes on
        if (self._stager.state_dict_cache or tensors).keys() != tensors.keys():  # an optimizer has made its first step
            self._stager = _stager()
        staged = self._stager.stage(tensors)
        self._pending = self._executor.submit(self._write, step, staged, plain, extra, started)
        self._pending_is_last = last

    def maybe_finish(self) -> None:
        """Raise the error of a background write that has ended; returns at once while it is running."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background write, if there is one, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._failure_allowed(self._pending_is_last):
                pending.result()

    @contextmanager
    def _failure_allowed(self, last: bool) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if last or self.on_failed_save == "stop":
                raise
            if self.rank == 0:
                print(f'WARNING: {error}. Training goes on: checkpoint.on_failed_save = "continue"', flush=True)

    def close(self) -> None:
        """Wait for the background write, free the staging memory and end the own process group, whose threads would
        otherwise take the GIL of an interpreter that is shutting down, which aborts the process. Call before the
        default process group is destroyed."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = self._stager = None
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """`close`. A background write that fails as well does not hide the error that ends the run."""
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            if self.rank == 0:
                print(f"WARNING: {failed}", flush=True)

    def _write(
        self, step: int, tensors: dict[str, Tensor], plain: dict[str, Any], extra: dict[str, str], started: float
    ) -> None:
        target = self.path(step)
        temporary = target.with_name(f"{target.name}.tmp")
        what, needed = f"cannot save {target}", 0
        try:
            needed = sum(self._everywhere(what, lambda: self._bytes(tensors)))
            self._everywhere(what, lambda: self._on_rank0(lambda: self._begin(temporary)))
            self._everywhere(what, lambda: self._on_rank0(lambda: self._check_space(needed)))
            faults.reach("save.before_shards", step)
            with dcp_errors(what, self.folder):
                dcp.save(
                    tensors,
                    storage_writer=_Writer(temporary, step),
                    planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=self._group,
                )
            faults.reach("save.before_manifest", step)
            self._commit(step, temporary, plain, extra)
        except DiskFull as error:  # on all ranks alike
            free = self._everywhere(what, lambda: self._on_rank0(lambda: self._free_without(temporary)))[0]
            raise DiskFull(
                f"{error}: {needed} bytes needed, {free} free in {self.folder}; earlier checkpoints are as they were"
            ) from None
        except Exception:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.rank == 0:
            size, seconds = needed / 2**20, time.perf_counter() - started
            print(f"saved checkpoint {target} ({size:.0f} MiB in {seconds:.1f} s)", flush=True)

    def _begin(self, temporary: Path) -> None:
        if temporary.exists():
            # Killed before the marker was whole, we leave a folder that holds at most a part of it.
            begun = all(path.name.startswith(f".{_MARKER}.") for path in temporary.iterdir())
            if not begun and not (temporary / _MARKER).exists():
                raise CheckpointError(f"{temporary} is in the way and is not ours; move it")
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        write_atomic(temporary / _MARKER, "written by fvtitan; without manifest.json it is incomplete\n")

    def _bytes(self, tensors: dict[str, Tensor]) -> int:
        """What this rank writes: its shards, of copies the first, and on rank 0 what is the same everywhere."""
        mine = [t for t in tensors.values() if (_is_first_copy(t) if isinstance(t, DTensor) else self.rank == 0)]
        return sum(local_tensor(t).numel() * t.element_size() for t in mine)

    def _check_space(self, needed: int) -> None:
        if shutil.disk_usage(self.folder).free < needed:
            raise DiskFull("the disk is too full")

    def _free_without(self, temporary: Path) -> int:
        """Bytes free when what was begun is gone."""
        shutil.rmtree(temporary, ignore_errors=True)
        return shutil.disk_usage(self.folder).free

    def _commit(self, step: int, temporary: Path, plain: dict[str, Any], extra: dict[str, str]) -> None:
        target = self.path(step)
        what = f"cannot commit {target}"
        own = {name: state for name, state in plain.items() if self.rank == 0 or _under(name, [_PER_RANK])}
        parts = self._everywhere(what, lambda: own)  # of others only what is not the same everywhere
        merged: dict[str, Any] = {}
        for part in parts:
            _merge(merged, part)

        def small_files() -> None:
            for name, content in {"state.json": json.dumps({"states": merged}), **extra}.items():
                write_atomic(temporary / name, content)

        self._everywhere(what, lambda: self._on_rank0(small_files))
        # Trained again from an earlier step: ours, whole, and not to be kept, or it goes aside.
        replaced = self._everywhere(what, lambda: self._on_rank0(lambda: _is_removable(target)))[0]
        if replaced:
            problem, _ = self._read_all(target)
            replaced = not problem
        entries = self._everywhere(what, lambda: [file_entry(file) for file in self._my_files(temporary)])

        def publish() -> None:
            files = sorted((entry for part in entries for entry in part), key=lambda entry: entry["name"])
            write_atomic(temporary / "manifest.json", json.dumps({"files": files}, indent=1))
            fsync_path(temporary)
            faults.reach("save.before_rename", step)
            old = target.with_name(f"{target.name}.old.tmp")
            if target.exists():  # the new one takes the name, then the old one goes
                old = old if replaced else _unused(target.with_name(f"{target.name}.aside"))
                print(f"{target} was there already: {'replacing it' if replaced else f'it is now {old}'}", flush=True)
                target.rename(old)
            temporary.rename(target)
            fsync_path(self.folder)
            if replaced:
                _remove(old)

        self._everywhere(what, lambda: self._on_rank0(publish))
        self._good.add(target.resolve())
        faults.reach("save.before_purge", step)
        if self.rank == 0:
            self._retain()

    def _my_files(self, folder: Path) -> list[Path]:
        """The files that this rank hashes: its own shards, which it has just written; rank 0 the rest."""
        names = {path: re.match(r"__(\d+)_", path.name) for path in folder.iterdir()}
        return [path for path, shard in names.items() if (int(shard[1]) if shard else 0) == self.rank]

    def _retain(self) -> None:
        """Leave the newest `keep_latest_k` of those known to be good, and whatever is newer. Of the older ones, those go
        that are complete, ours and not kept, but never the one that this run was resumed from."""
        try:
            self._remove_leftovers()
            steps = [step for step in self.steps() if not (self.path(step) / _KEEP).exists()]
            good = [step for step in steps if self.path(step).resolve() in self._good]
            if not 0 < self.keep_latest_k <= len(good):
                return
            for path in [self.path(step) for step in steps if step < good[-self.keep_latest_k]]:
                if _is_removable(path) and self._loaded_from != path.resolve():
                    _remove(path.rename(path.with_name(f"{path.name}.tmp")))  # invisible first: it goes as a whole
        except OSError as error:
            logger.warning("could not remove old checkpoints from %s: %s", self.folder, error)

    def _remove_leftovers(self) -> None:
        """Clear what a killed run, or a removal that failed, left; a checkpoint that was about to be replaced gets its
        name back."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            name = _TEMPORARY.fullmatch(path.name)
            if not name or not (path / _MARKER).exists():
                continue
            target = self.folder / name[1]
            if name[2] and not target.exists() and is_complete(path):
                path.rename(target)
                continue
            print(f"removing the incomplete checkpoint {path}", flush=True)
            _remove(path)

    # Loading

    def load(
        self,
        source: int | str | Path,
        states: Mapping[str, Stateful],
        *,
        allow_missing: Collection[str] = (),
        allow_unexpected: Collection[str] = (),
        allow_cast: bool = False,
    ) -> list[str]:
        """Load a step of this folder, or a checkpoint folder anywhere. Returns the states that it lacks.

        `allow_missing`: name prefixes of states that the checkpoint may lack; such a state is left as it is, as a
        whole. `allow_unexpected`: prefixes of what the checkpoint may hold beyond `states` ("" for anything).
        `random_state` may always differ. `allow_cast` permits other dtypes than the saved ones.

        Raises `DamagedCheckpoint` when a file is not what was written, and `UserError` when names, shapes or dtypes
        differ, before any state is touched. Only what was made by hand to pass for whole can fail later.
        """
        path = self.path(source) if isinstance(source, int) else Path(source)
        what = f"cannot load {path}"
        found, self._found = self._found, None
        problem, files = ("", found[1]) if found and found[0] == path else self._read_all(path)
        if problem:
            self._refuse(path, problem)
        saved_tensors, saved_plain = self._everywhere(what, lambda: read_index(path, files), share=False)

        def plan() -> tuple[list[str], dict[str, Any], dict[str, Tensor]]:
            names, templates, tensors = _match(states, saved_tensors, saved_plain, allow_missing)
            _compare(tensors, saved_tensors, names, saved_plain, allow_unexpected, allow_cast)
            return names, templates, tensors

        names, templates, tensors = self._everywhere(what, plan, share=False)
        lacking = sorted(set(states) - set(names))
        for name in lacking:
            logger.warning("%s is not in %s: it starts anew", name, path)
        read_into(tensors, path, files, what, self._group)

        def restore() -> None:
            for name in sorted(
                names, key=lambda name: not _under(name, [_PER_RANK])
            ):  # first what can refuse its values
                states[name].load_state_dict(_join(templates[name], saved_plain[name], f"{name}.", tensors))

        self._everywhere(what, restore)
        self._loaded_from = path.resolve()
        return lacking

    def _read_all(self, path: Path) -> tuple[str, set[str]]:
        """What is wrong with a checkpoint, the same on all ranks, or ""; and the names in its manifest. Collective.
        Raises `UserError` when there is none."""
        try:
            files = self._everywhere(
                f"cannot read {path}", lambda: verify_share(path, self.rank, self.world_size), share=False
            )
        except DamagedCheckpoint as error:
            return str(error), set()
        self._good.add(path.resolve())
        return "", files

    def _refuse(self, path: Path, problem: str) -> NoReturn:
        """Raise `DamagedCheckpoint`, and say which of those beside it is the newest that is whole. Collective."""
        folder = path.parent
        others = self._everywhere(problem, lambda: self._on_rank0(lambda: self._folders(folder)))[0]
        damaged = []
        for step in reversed(others):
            other = folder / f"step-{step}"
            if other == path:
                continue
            if self._read_all(other)[0]:
                damaged.append(str(step))
                continue
            hint = f"step {step} was read and is whole"
            if folder == self.folder:
                hint += f": set checkpoint.load_step = {step}, or checkpoint.fallback = true"
            break
        else:
            hint = "no other one is whole" if damaged else "there is no other one"
        if damaged:
            hint += f" (damaged as well: {', '.join(damaged)})"
        raise DamagedCheckpoint(f"{problem}; {hint}")

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


def _stager() -> BlockingAsyncStager:
    """Copies to memory that is pinned and kept, with a GPU. (DefaultStager of torch 2.11 stages once.)"""
    return BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())


def _portable(error: Exception | None) -> tuple[type[Exception], str] | None:
    """The kind and message to raise on all ranks. Errors of the system become `CheckpointError`."""
    if error is None:
        return None
    if isinstance(error, UserError | CheckpointError):
        return type(error), shortened(error, 5000)
    if is_disk_full(error):
        return DiskFull, error.strerror
    return CheckpointError, shortened(f"{type(error).__name__}: {error}", 1000)


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
            f"the checkpoint lacks {listed(refused)}; it holds {listed(saved_plain)}. "
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
        tensors |= wanted  # parameters and averages are read in place: there may be no room for a copy
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
        f"{len(keys)} {title}: {listed(keys)}"
        for title, keys in (
            ("missing in the checkpoint", missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape or dtype", differing),
        )
        if keys
    ]
    if problems:
        raise UserError(f"the checkpoint does not fit this run. {'; '.join(problems)}")


# Folders


def _is_removable(path: Path) -> bool:
    return (path / _MARKER).exists() and not (path / _KEEP).exists()


def _remove(folder: Path) -> None:
    """Remove a folder of ours, its marker last, so that what an error leaves can be removed the next time."""
    try:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _MARKER:
                path.unlink()
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("could not remove %s: %s; the next save tries again", folder, error)


def _unused(path: Path) -> Path:
    """The path, or the first of `<path>-2`, `<path>-3`, ... that is not there."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path, overwrite=False)
        self._step = step

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save tells of its own file's lengths; what the system said is behind it, and is lost on the way to
            # other ranks.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None
        faults.reach("save.shards", self._step)
        return written

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # the original holds this machine's absolute path
