"""How a run stops, and what it says about it: signals and files that ask, one agreement of all ranks, `status.json`, the lock.

<dump_folder>/lock                    held by rank 0 while the run lives; the kernel frees it when the process dies
<dump_folder>/status.json             state (running, finished, stopped, failed), step, reason, exit_code, started, updated
<dump_folder>/stop, save, validate    made by hand: asks for that at the end of the next step, and is removed; one that is
                                      older than the run asked an earlier run
"""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import socket
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fvtitan.components.files import lock_file, write_atomic
from fvtitan.components.processes import end_with_parent, process_start
from fvtitan.distributed.utils import log, on_rank_zero
from fvtitan.errors import UserError, exit_status, redacted

EXIT_STOPPED = 75  # sysexits.h: EX_TEMPFAIL, try again later; the statuses of errors are those of errors.exit_status

# A scheduler that signals every process of a job reaches a rank twice: by itself, and through torchrun, which passes it on.
SAME_SIGNAL_SECONDS = 1.0

_FILES = ("stop", "save", "validate")
_REASONS = ("", "the file stop", "SIGINT", "SIGUSR1", "SIGTERM")  # by the number that travels
_SIGNALS = {getattr(signal, name): name for name in _REASONS if name.startswith("SIG")}
_STATUS_SECONDS = 10.0  # how old the step in it may be while the run lives


@dataclass(frozen=True)
class Asked:
    """What all ranks do at the end of this step: `stop` is the reason, or empty."""

    stop: str = ""
    save: bool = False
    validate: bool = False


class Stops:
    """One run in `folder`: enter it before anything is written there, leave it last.

    SIGTERM, SIGINT and SIGUSR1 ask for a stop, which the ranks agree on within a step. The process ends hard, with the exit
    status a shell gives to that signal, when it is still there `grace_seconds` later, or when another one comes.
    `timeout`: of the agreement.

    Collective. Raises `UserError` on all ranks when another run has the folder, or when it cannot be one.
    """

    def __init__(self, folder: str | Path, grace_seconds: float, timeout: datetime.timedelta | None = None) -> None:
        self.folder, self.grace_seconds, self.timeout = Path(folder), grace_seconds, timeout
        self.step: int | None = None  # the last complete one
        self.reason = ""
        self.cause = ""  # what failed first, on another rank
        self.exit_code = 0
        self._rank = dist.get_rank()
        self._started, self._state, self._written = _now(), "running", 0.0
        self._flags = np.zeros(len(_FILES), dtype=np.int32)  # shares its memory with the tensor that is reduced
        self._found: list[str] = []
        self._signal = 0
        self._lock: int | None = None
        self._bell: tuple[socket.socket, socket.socket] | None = None

    # ------------------------------------------------------------------------------------------ the whole run

    def __enter__(self) -> Stops:
        for line in on_rank_zero(self._take_folder):
            log(line)
        # Its own group: the agreement runs beside the collectives of the step.
        self._group = dist.new_group(backend="gloo", timeout=self.timeout, group_desc="stops")
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (action := forget()) and action())
        # Python runs a handler between two bytecodes of the main thread, never while it waits in a collective. So they do
        # nothing, and a thread hears what the interpreter writes into the socket at once.
        self._bell = socket.socketpair()
        self._bell[1].setblocking(False)
        self._bell_before = signal.set_wakeup_fd(self._bell[1].fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._listener = threading.Thread(target=self._listen, name="stops", daemon=True)
        self._listener.start()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(signal.SIGTERM)  # a rank whose torchrun was killed would train on, and write, unseen
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        state = "stopped" if self.exit_code else "finished"
        if error is not None:
            state, self.exit_code = "failed", exit_status(error)
            said = str(error) if hasattr(error, "exit_status") else f"{kind.__name__}: {error}"
            self.reason = self.cause or said
        self._write_status(state)
        if error is None:
            dist.barrier(self._group)  # torchrun ends the others as soon as one rank exits with a status
        self._stop_listening()
        dist.destroy_process_group(self._group)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_folder(self) -> list[str]:
        """Lock the folder, and clear what asked an earlier run; lines about it."""
        lines = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock, unlocked = lock_file(self.folder / "lock")
            except BlockingIOError as error:
                raise UserError(
                    f"job.dump_folder = {str(self.folder)!r}: the run folder is in use by {error.strerror}; stop that one, or "
                    "take another folder"
                ) from None
            if unlocked:
                lines.append(f"WARNING: {self.folder} cannot be locked ({unlocked}): see that one run writes there")
            for name in _FILES:
                if (self.folder / name).exists() and not _asks_this_run(self.folder / name):
                    (self.folder / name).unlink()
                    lines.append(f"removed {self.folder / name}: it asked an earlier run")
        except OSError as error:
            raise UserError(f"job.dump_folder = {str(self.folder)!r} cannot be used: {error.strerror}") from None
        if (before := read_status(self.folder)).get("state") == "running":
            lines.append(f"an earlier run here ended without saying so, after step {before['step']}: killed")
        self._write_status("running")
        return lines

    # ---------------------------------------------------------------------------------------------- every step

    def begin_step(self) -> None:
        """Start to agree on what was asked for until now, while the step runs."""
        self._flags[:] = 0
        if self._rank == 0:
            self._found = [name for name in _FILES if (self.folder / name).exists()]
            self._flags[[_FILES.index(name) for name in self._found]] = 1
        if self._signal:
            self._flags[0] = _REASONS.index(_SIGNALS[self._signal])
        self._work = dist.all_reduce(
            torch.from_numpy(self._flags), op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def end_step(self, step: int, *, last: bool) -> Asked:
        """What was agreed on. After the last step a run is finished, not stopped."""
        self._work.wait()  # for the slowest rank to have begun the step that this one has ended
        self.step = step
        stop, save, validate = (int(flag) for flag in self._flags)
        for name in self._found:
            log(f"step {step}: {self.folder / name} asks to {name}")
            (self.folder / name).unlink(missing_ok=True)
        self._found = []
        if stop and not last:
            self.reason, self.exit_code = _REASONS[stop], EXIT_STOPPED
        if self._rank == 0 and time.monotonic() - self._written > _STATUS_SECONDS:
            self._write_status("running")
        return Asked(self.reason, bool(save), bool(validate))

    # ------------------------------------------------------------------------------------------------- signals

    def _listen(self) -> None:
        first = 0.0
        while True:
            left = max(0.0, first + self.grace_seconds - time.monotonic()) if self._signal else None
            if not select.select([self._bell[0]], [], [], left)[0]:
                self._leave(f"still there {self.grace_seconds:g} s after {_SIGNALS[self._signal]}")
            heard = self._bell[0].recv(1)
            if not heard:
                return
            if heard[0] not in _SIGNALS:
                continue
            if not self._signal:
                self._signal, first = heard[0], time.monotonic()
                self._say(f"{_SIGNALS[heard[0]]}: stopping at the end of the next step; once more: at once")
            elif time.monotonic() - first > SAME_SIGNAL_SECONDS:
                self._leave(f"{_SIGNALS[heard[0]]}, the second signal")

    def _leave(self, reason: str) -> None:
        """End this process now, whatever its main thread does. Nothing is saved; earlier checkpoints are as they were."""
        self._say(f"{reason}: leaving at once")
        if self._state == "running":  # else the run has ended and said so
            self.reason, self.exit_code = reason, 128 + self._signal
            self._write_status("failed")
        os._exit(self.exit_code)

    def _say(self, message: str) -> None:
        # Not print: its lock may be held by the main thread.
        os.write(2, f"rank {self._rank}: {message}\n".encode())

    def _stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._bell_before)
        self._bell[1].close()
        self._listener.join()
        self._bell[0].close()
        self._bell = None

    def _forget(self) -> None:
        """In a forked child (a loader's worker): neither the lock nor the signals are its business."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._bell is not None:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            for end in self._bell:
                end.close()
            self._bell = None

    # -------------------------------------------------------------------------------------------------- status

    def fail(self, reason: str, status: int) -> None:
        """Write that the run has failed; for any rank and thread that is about to end its process with this status."""
        if self._state == "running":  # else the run has ended and said so
            self.reason, self.exit_code = reason, status
            self._write_status("failed", any_rank=True)

    def _write_status(self, state: str, *, any_rank: bool = False) -> None:
        self._state = state
        if self._rank != 0 and not any_rank:
            return
        status = {"state": state, "step": self.step, "reason": _one_line(self.reason)}
        status["exit_code"] = None if state == "running" else self.exit_code
        status |= {"started": self._started, "updated": _now()}
        self._written = time.monotonic()
        path, text = self.folder / "status.json", json.dumps(status, indent=2) + "\n"
        try:
            try:
                write_atomic(path, text)
            except OSError:  # a full disk has no room for another file, but for what this one says
                with open(path, "r+") as file:
                    file.write(text)
                    file.truncate()
        except OSError as error:  # the run's own error is the one to see
            self._say(f"cannot write {path}: {error.strerror}")


def read_status(folder: str | Path) -> dict[str, Any]:
    """What `status.json` says, or nothing. "running" is true only while the lock is held."""
    try:
        return json.loads((Path(folder) / "status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _asks_this_run(path: Path) -> bool:
    """Whether a file is meant for this run although it was there first: it came after the process, or run_slurm.sh, which
    begins earlier, has written this job's name into it."""
    job = os.environ.get("RDZV_ID", "")
    return path.stat().st_mtime >= process_start() or (job != "" and path.read_bytes().strip() == job.encode())


def _one_line(reason: str) -> str:
    return (redacted(reason).strip().splitlines() or [""])[0][:500]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
