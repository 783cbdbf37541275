"""Process group, device, and the few operations on sharded parameters that everything else needs."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from fvtitan.components import faults
from fvtitan.components.files import lock_file
from fvtitan.errors import UserError, is_disk_full, redacted


@dataclass
class CommConfig:
    """[comm]: collectives."""

    timeout_seconds: int = 1800
    """A collective that waits longer, or a rank that gets no further in a micro-batch for longer, ends the job: all write their
    stacks, `status.json` says who did not arrive. A loader's worker may take half of it for a batch. It must outlast a
    compilation, a validation and a checkpoint."""
    stop_grace_seconds: int = 25
    """SIGTERM, SIGINT or SIGUSR1: all ranks stop within a step, save, and exit with status 75. A process that is still there
    after this many seconds ends at once, without saving. torchrun kills after 30, or its --shutdown-timeout."""

    def check(self) -> None:
        if self.timeout_seconds < 1:
            raise UserError(f"comm.timeout_seconds = {self.timeout_seconds}: must be >= 1")
        if self.stop_grace_seconds < 1:
            raise UserError(f"comm.stop_grace_seconds = {self.stop_grace_seconds}: must be >= 1")

    @property
    def timeout(self) -> datetime.timedelta:
        """For every process group: torch gives those that are made later a time of its own."""
        return datetime.timedelta(seconds=self.timeout_seconds)


_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_SET_HERE: set[str] = set()  # variables, until the process group ends


def init_distributed(cfg: CommConfig, dump_folder: Path | None = None) -> torch.device:
    """Start the process group (NCCL with a GPU, gloo always) under torchrun, or alone; returns this process's device. NCCL
    writes what it recorded into `dump_folder` when one of its collectives times out."""
    faults.arm(os.environ)
    _record_collectives(dump_folder)
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=cfg.timeout)
    else:
        loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
        if loopback and _GLOO_INTERFACE not in os.environ:
            os.environ[_GLOO_INTERFACE] = loopback.pop()  # alone: no port that others can reach
            _SET_HERE.add(_GLOO_INTERFACE)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=cfg.timeout)
    return device


def _record_collectives(dump_folder: Path | None) -> None:
    """Have torch's flight recorder keep the last collectives, to see who hangs where; what the user has set stays."""
    defaults = {("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000", ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1"}
    if dump_folder is not None:
        prefix = dump_folder.absolute() / "nccl_trace.rank"
        defaults["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(prefix)
    for names, value in defaults.items():
        if not any(name in os.environ for name in names):  # the older name counts as well
            os.environ[names[0]] = value


def close_distributed() -> None:
    """End the process group, so that the process can exit."""
    dist.destroy_process_group()
    while _SET_HERE:
        del os.environ[_SET_HERE.pop()]
    # gloo's threads outlive it, and need the GIL to let go of the last collective's tensors. A thread that asks for it when
    # the interpreter is already shutting down aborts the process ("terminate called without an active exception").
    time.sleep(0.1)


def use_private_compile_cache() -> None:
    """Let torch.compile keep its code where only this user can write: what lies there is run, and the folder it takes by itself
    has a name that anyone on the machine can foresee and take first. TORCHINDUCTOR_CACHE_DIR is the user's own choice.

    Raises `UserError` when the folder is not only this user's.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # torch sets it to that when it is imported

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    folder = Path(tempfile.gettempdir()) / f"fvtitan-compiled-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(
            f"{folder}: compiled code would be read from here, and others could write it (it must be a folder of yours, "
            "writable by you alone): remove it, or set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def world_size_from_environment() -> int:
    """The number of processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: Tensor) -> slice:
    """The rows (dimension 0) of the full parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    sharded = [dim for dim, p in enumerate(parameter.placements) if not isinstance(p, Replicate)]
    if not sharded:
        return slice(0, parameter.shape[0])
    if len(sharded) > 1 or parameter.placements[sharded[0]] != Shard(0):
        raise ValueError(f"expected one Shard(0) placement, got {parameter.placements}")
    rows, mesh = parameter.shape[0], parameter.device_mesh
    chunk = -(-rows // mesh.size(sharded[0]))  # FSDP2 splits as torch.chunk does
    start = min(chunk * mesh.get_local_rank(sharded[0]), rows)
    return slice(start, min(start + chunk, rows))


def reshard(module: nn.Module) -> None:
    """Free gathered parameters. Call before anything writes to the sharded ones (optimizer, EMA, loading): FSDP2 keeps
    the root gathered after a forward without gradient, and writes made meanwhile do not reach it."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """Inside, a sharded module keeps what its forwards gather, so that several in a row, and backwards between them, gather
    once. `reshard_after_forward`: whether it is built to free that after each forward, as it does again afterwards."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshard_after_forward, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
        reshard(module)


def clip_grad_norm(parameters: Mapping[str, nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their global L2 norm is at most `max_norm`; returns the norm before, a 0-d tensor.

    The norm of sharded gradients is made full before clipping: a norm of local shards would clip each rank differently.
    """
    with_gradient = [p for p in parameters.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def mean_over_ranks(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Average every value over all ranks, in one collective; the keys must be the same everywhere."""
    return {key: total / dist.get_world_size() for key, total in _reduced(values, device, dist.ReduceOp.SUM).items()}


def max_over_ranks(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """The largest of every value over all ranks, in one collective; the keys must be the same everywhere."""
    return _reduced(values, device, dist.ReduceOp.MAX)


def _reduced(values: dict[str, Tensor | float], device: torch.device, op: dist.ReduceOp) -> dict[str, float]:
    tensors = sorted(key for key, value in values.items() if isinstance(value, Tensor))
    numbers = sorted(values.keys() - tensors)
    stacked = torch.tensor([values[key] for key in numbers], dtype=torch.float64).to(device)
    if tensors:  # put together where they are: one at a time, each would stall a GPU
        stacked = torch.cat([stacked, torch.stack([values[key].to(device, torch.float64) for key in tensors])])
    if not faults.skips("collective"):
        dist.all_reduce(stacked, op=op)
    return dict(zip([*numbers, *tensors], stacked.tolist(), strict=True))


def on_every_rank(action: Callable[[], Any]) -> list[Any]:
    """What `action` returns on each rank, in their order. The error of one is raised on all: a `UserError` as it is, others
    elsewhere than where they happened as a RuntimeError of the same text. Without a process group: of this process."""
    result = failure = None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcomes: list[Any] = [(failure, result)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        known = failure is None or isinstance(failure, UserError)
        told = failure if known else RuntimeError(f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}")
        outcomes *= dist.get_world_size()
        dist.all_gather_object(outcomes, (told, result))
    for error in [failure, *(other for other, _ in outcomes)]:
        if error is not None:
            raise error
    return [other for _, other in outcomes]


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, or the `UserError` it raises there, on every rank."""
    outcome: list[Any] = [None, ""]
    if rank_and_world()[0] == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


_HELD: set[int] = set()  # locks of only_job, which forked children let go: they may outlive a killed parent
os.register_at_fork(after_in_child=lambda: [os.close(_HELD.pop()) for _ in range(len(_HELD))])


@contextlib.contextmanager
def only_job(
    folder: str | Path, lock: Path | None = None, then: str = "when that is done, the same command uses it"
) -> Iterator[None]:
    """One job at a time makes `folder`; all its ranks enter together. `lock`: the file that says so, beside the folder unless
    given. Raises `UserError` when another job is at it, with `then` for advice, or when there can be no such folder."""
    path = Path(folder)
    whole = Path(os.path.abspath(path))  # "." has no name
    lock = lock or whole.parent / f".{whole.name}.lock"

    def take() -> int:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor, unlocked = lock_file(lock)
            _HELD.add(descriptor)
            if unlocked:
                print(f"WARNING: {path} cannot be locked ({unlocked}): see that one job makes it", flush=True)
            return descriptor
        except BlockingIOError as error:
            raise UserError(f"{path} is being made by {error.strerror}: {then}") from None
        except OSError as error:
            if is_disk_full(error):
                raise
            raise UserError(f"{path} cannot be made ({error.strerror}): name another folder") from None

    descriptor = on_rank_zero(take)
    try:
        yield
    finally:
        if rank_and_world()[0] == 0:
            _HELD.discard(descriptor)
            lock.unlink(missing_ok=True)  # while it is held: see lock_file
            os.close(descriptor)


def free_memory(device: torch.device) -> None:
    """Give back what no name holds any more: whole networks are cycles of references, which go when Python collects."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def log(message: str) -> None:
    """Print one line, on rank 0."""
    if dist.get_rank() == 0:
        print(redacted(message), flush=True)
