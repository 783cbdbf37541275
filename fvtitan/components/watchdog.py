"""Hangs and first failures: a job that gets no further ends in bounded time, and says which rank did not arrive where.

<dump_folder>/stacks.rank<r>.txt            the Python stacks of all threads, of every hang so far
<dump_folder>/flight_recorder.rank<r>.json  the last collectives, as torch recorded them
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fvtitan.components.stops import Stops
from fvtitan.errors import exit_status

_POLL_SECONDS = 1.0
_GATHER_SECONDS = 4.0  # for the reports of the others
_CAUSE_SECONDS = 3.0  # for a rank that has closed a connection to say why
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LAST_RESORT_SECONDS = 10.0  # until a rank ends whose Python threads do not run, or whose disk does not answer
_UNWIND_SECONDS = 20.0  # for a rank to end by itself after another has failed
_RECORDED = 100  # collectives of a group that a report holds
_PROJECT = str(Path(__file__).parents[2])


class Watchdog:
    """One thread a rank. Between `beat` and the next, at most `timeout_seconds` may pass, or until `resting`, where the
    collectives' own timeout is the limit: set-up, checkpoints and validation may take longer than a step.

    A rank that is late tells the others through the rendezvous' store. All write their stacks, rank 0 (or the first that
    answers) says in `status.json` who did not arrive, and all exit with status 1, also from within a collective. A collective
    of gloo that times out does the same. A rank that fails by another exception tells too: what the others raise because of it
    is not the reason, and who is still there 20 s later (waiting on a GPU for a rank that has left) ends.
    """

    def __init__(self, folder: str | Path, timeout_seconds: float, stops: Stops) -> None:
        self.folder, self.timeout_seconds, self.stops = Path(folder), timeout_seconds, stops
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._where, self._since = "set-up", time.monotonic()
        self._limited = False
        self._ended = threading.Event()
        self._leaving = threading.Lock()

    # --------------------------------------------------------------------------------------- the main thread

    def __enter__(self) -> Watchdog:
        # Its own connection: that of the main thread may be waiting.
        store = dist.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=_GATHER_SECONDS))
        self._store = dist.PrefixStore("watchdog", store)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self.folder / f"stacks.rank{self.rank}.txt", "ab", buffering=0)
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # a crash in C says where Python was
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def beat(self, where: str) -> None:
        """The rank is now `where` ("step 3, student"), and must get further in time."""
        self._where, self._since, self._limited = where, time.monotonic(), True
        # In C, without the GIL: for a main thread that holds it forever.
        late = self.timeout_seconds + _LAST_RESORT_SECONDS
        faulthandler.dump_traceback_later(late, file=self._stacks, exit=True)

    @contextlib.contextmanager
    def resting(self, where: str) -> Iterator[None]:
        """Inside, and until the next beat, the rank may take longer than a step."""
        self._where, self._since, self._limited = where, time.monotonic(), False
        faulthandler.cancel_dump_traceback_later()
        yield

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and ("Timed out waiting" in str(error) or self._follows_a_hang(error)):
            self._leave(error)
        if self._leaving.locked():
            self._thread.join()  # which ends the process
        self._limited = False
        faulthandler.cancel_dump_traceback_later()
        if error is not None:
            with contextlib.suppress(RuntimeError):  # the store may be gone
                self._tell_failure(f"{kind.__name__}: {error}", exit_status(error))
        self._ended.set()
        self._thread.join()
        self._stacks.close()
        path = self.folder / f"stacks.rank{self.rank}.txt"
        if path.exists() and path.stat().st_size == 0:
            path.unlink()

    def _follows_a_hang(self, error: BaseException) -> bool:
        """Whether a connection was lost to a rank whose collective had timed out: it tells, maybe a little later."""
        end = time.monotonic() + _CAUSE_SECONDS * any(words in str(error) for words in _LOST_CONNECTION)
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end and not self._store.check(["failure"]):
                if self._store.check(["hang"]):
                    return True
                time.sleep(0.05)
        return False

    def _tell_failure(self, what: str, status: int) -> None:
        """Be the first to fail, or learn who was."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", json.dumps([self.rank, what, status]))
            return
        rank, first, _ = json.loads(self._store.get("failure"))
        if first != what:
            self.stops.cause = f"rank {rank}: {first}"

    # ---------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        failed_at: float | None = None
        while True:
            late = self._since + self.timeout_seconds - time.monotonic() if self._limited else _POLL_SECONDS
            if self._ended.wait(min(_POLL_SECONDS, max(late, 0.0))):
                return
            if self._limited and time.monotonic() - self._since >= self.timeout_seconds:
                return self._leave()
            with contextlib.suppress(RuntimeError):
                if self._store.check(["hang"]):
                    return self._leave()
                if failed_at is None and self._store.check(["failure"]):
                    failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _UNWIND_SECONDS:
                return self._leave()

    def _leave(self, error: BaseException | None = None) -> None:
        """Write down where this rank is, or was when a collective raised `error`, hear the others, end the process."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(2 * _LAST_RESORT_SECONDS)  # the other thread ends the process
        faulthandler.dump_traceback_later(_LAST_RESORT_SECONDS, file=self._stacks, exit=True)
        seconds = time.monotonic() - self._since
        report = {"where": self._where, "seconds": seconds, "line": _line(error), "groups": {}}
        status = 1
        try:
            with contextlib.suppress(RuntimeError):
                self._store.set("hang", str(self.rank))
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            title = f"{now} rank {self.rank}, pid {os.getpid()} on {socket.gethostname()}: {self._where} for {seconds:.0f} s"
            self._stacks.write(f"\n{title}\n".encode())
            if error is not None:
                self._stacks.write("".join(traceback.format_exception(error)).encode())
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            if recorded := _flight_recorder():
                (self.folder / f"flight_recorder.rank{self.rank}.json").write_bytes(recorded)
                report["groups"] = _last_collectives(json.loads(recorded))
            reports = self._reports(report)
            failure, status = self._failure()
            reason, lines = explain(reports, self.world_size, failure)
            if self.rank == min(reports):
                self._say("\n".join([reason, *lines]))
                self.stops.fail(reason, status)
                self._store.set("said", "")
            else:  # torchrun ends all as soon as one has exited
                self._store.wait(["said"], timedelta(seconds=_GATHER_SECONDS))
        except BaseException as error:
            self._say(f"no progress, {report['where']}, at {report['line']}; and then {type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def _reports(self, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Those of all ranks that answer in time."""
        reports, end = {self.rank: own}, time.monotonic() + _GATHER_SECONDS
        with contextlib.suppress(RuntimeError):
            self._store.set(f"report.{self.rank}", json.dumps(own))
            while len(reports) < self.world_size and time.monotonic() < end:
                for rank in range(self.world_size):
                    if rank not in reports and self._store.check([f"report.{rank}"]):
                        reports[rank] = json.loads(self._store.get(f"report.{rank}"))
                time.sleep(0.05)
        return reports

    def _failure(self) -> tuple[str, int]:
        """What the first rank to fail has told, or nothing, and the exit status that it gives."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failure"]):
                rank, what, status = json.loads(self._store.get("failure"))
                return f"rank {rank}: {what}", status
        return "", 1

    def _say(self, message: str) -> None:
        # Not print: its lock may be held by the main thread.
        os.write(2, "".join(f"rank {self.rank}: {line}\n" for line in message.splitlines()).encode())


def explain(reports: Mapping[int, Mapping[str, Any]], world_size: int, failure: str = "") -> tuple[str, list[str]]:
    """(the reason in one line, a line a rank). `reports`, by rank: where, seconds, line, and groups: of each process group its
    last collectives by their number, as text. `failure`: what a rank that failed has told."""
    lines = [
        f"  rank {rank}: {report['where']} for {report['seconds']:.0f} s, at {report['line']}"
        for rank, report in sorted(reports.items())
    ]
    if failure:
        return failure, lines
    behind, silent = _behind(reports), [rank for rank in range(world_size) if rank not in reports]
    parts = [f"no progress for {max(report['seconds'] for report in reports.values()):.0f} s"]
    parts += [f"rank {', '.join(map(str, silent))} does not answer"] if silent else []
    parts += [what for _, what in behind[:3]]
    late = behind[0][0][0] if behind else max(reports, key=lambda rank: reports[rank]["seconds"])
    parts.append(f"rank {late} is in {reports[late]['where']}, at {reports[late]['line']}")
    return "; ".join(parts), lines


def _behind(reports: Mapping[int, Mapping[str, Any]]) -> list[tuple[list[int], str]]:
    """(ranks, what they have not called or called otherwise) of every process group whose ranks are not at one."""
    found = []
    for group in sorted({group for report in reports.values() for group in report["groups"]}):
        calls = {rank: report["groups"][group] for rank, report in reports.items() if group in report["groups"]}
        both = sorted(set.intersection(*map(set, calls.values())), key=int)
        differing = next((n for n in both if len({_kind(named[n]) for named in calls.values()}) > 1), None)
        last = {rank: max(map(int, named)) for rank, named in calls.items()}
        common = min(last.values())
        if differing is not None:
            said = ", but ".join(f"{named[differing]} on rank {rank}" for rank, named in calls.items())
            found.append((sorted(calls), f"collective {differing} of {group} is {said}"))
        elif max(last.values()) > common:
            ranks = [rank for rank, number in last.items() if number == common]
            name = next((n[str(common + 1)] for n in calls.values() if str(common + 1) in n), "what followed")
            missing = ", ".join(map(str, ranks))
            found.append((ranks, f"rank {missing} did not come to collective {common + 1} of {group}, {name}"))
    return found


def _kind(call: str) -> str:
    """What must be the same on all ranks: of others than reductions the shape need not be."""
    return call if "all_reduce" in call else call.split()[0]


def _flight_recorder() -> bytes:
    """The last collectives of this process as JSON; nothing where torch does not record them."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if dump := getattr(torch._C._distributed_c10d, name, None):
            recorded = dump()
            recorded = recorded.encode() if isinstance(recorded, str) else recorded
            if json.loads(recorded).get("entries"):
                return recorded
    return b""


def _last_collectives(recorded: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By process group and number: "gloo:all_reduce [32]"."""
    groups: dict[str, dict[str, str]] = {}
    for entry in recorded["entries"]:
        if not entry["is_p2p"]:
            name, description = entry["process_group"]
            group = groups.setdefault(f"{description} (group {name})", {})
            shape = entry["input_sizes"][0] if entry["input_sizes"] else []
            group[str(entry["collective_seq_id"])] = f"{entry['profiling_name']} {shape}"
    return {name: dict(list(calls.items())[-_RECORDED:]) for name, calls in groups.items()}


def _line(error: BaseException | None) -> str:
    """Where the main thread is, or where it raised the error, as far as the code is the project's."""
    if error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    else:
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[threading.main_thread().ident])]
    for frame in frames:
        file = frame.f_code.co_filename
        if file.startswith(_PROJECT) and "site-packages" not in file:
            return f"{os.path.relpath(file, _PROJECT)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return "an unknown place"
