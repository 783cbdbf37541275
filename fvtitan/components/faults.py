"""Faults on purpose, for the tests of what happens then. Without FVTITAN_TEST=1 in the environment nothing here acts.

FVTITAN_TEST=1 FVTITAN_FAULTS="kill save.before_manifest step=4 rank=1; nan loss step=2" torchrun train.py ...

Each fault is `<kind> <point> [step=N] [rank=R] [times=N]`; without step or rank, on every one; `times` = 1 by default, 0: no
limit. Kinds: kill (SIGKILL), term (SIGTERM), exit (os._exit, as a crash in C does), raise (RuntimeError), hang (for good),
freeze (the same with the GIL held); nan, inf, spike (x 1000) of a tensor that passes; skip (a call). Points: `POINTS`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fvtitan.errors import UserError, did_you_mean

ACTS = ("kill", "term", "exit", "raise", "hang", "freeze")
VALUES = {  # what has its derivatives: nan and inf leave them finite
    "nan": lambda value: value + float("nan"),
    "inf": lambda value: value + float("inf"),
    "spike": lambda value: value * 1000,
}
POINTS = {
    "step": ACTS,  # train.py, at the start of a step
    "save.before_shards": ACTS,  # the temporary folder is there
    "save.shards": ACTS,  # while the shards are written
    "save.before_manifest": ACTS,
    "save.before_rename": ACTS,
    "save.before_purge": ACTS,  # the new checkpoint is there, the old ones are too
    "validation": ACTS,  # at its start
    "loader": ACTS,  # a sample is read, in the loader's process; its step is the sample's index
    "export.weights": ACTS,  # a tensor is written; its step is the tensor's number in its file
    "export.before_rename": ACTS,
    "export.between_renames": ACTS,  # the old export is out of the way, the new one has no name yet
    "loss": tuple(VALUES),  # of a micro-batch
    "collective": ("skip",),  # the reduction of logged values
    "gradient": tuple(VALUES),  # of one parameter (this rank's shard), after the backward of a phase
}


@dataclass
class Fault:
    """One entry of FVTITAN_FAULTS."""

    kind: str
    point: str
    step: int | None = None
    rank: int | None = None
    times: int = 1


_faults: list[Fault] = []


def arm(environment: Mapping[str, str]) -> None:
    """Expect the faults that the environment asks for. Raises `UserError` outside of tests, and for what is not one."""
    _faults.clear()
    text = environment.get("FVTITAN_FAULTS", "").strip()
    if not text:
        return
    if environment.get("FVTITAN_TEST") != "1":
        raise UserError(
            f"FVTITAN_FAULTS = {text!r} breaks a run on purpose: it is for tests, with FVTITAN_TEST=1; unset it"
        )
    _faults.extend(_parse(entry) for entry in text.split(";"))


def _parse(entry: str) -> Fault:
    where = f"FVTITAN_FAULTS: {entry.strip()!r}"
    kind, point, *options = [*entry.split(), "", ""][: max(2, len(entry.split()))]
    if point not in POINTS:
        raise UserError(f"{where}: {point!r} is not a point.{did_you_mean(point, POINTS)}")
    if kind not in POINTS[point]:
        raise UserError(f"{where}: {kind!r} cannot happen there.{did_you_mean(kind, POINTS[point])}")
    numbers = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("step", "rank", "times") or not value.isdigit():
            raise UserError(f"{where}: {option!r} is not step=N, rank=N or times=N")
        numbers[name] = int(value)
    return Fault(kind, point, **numbers)


def _due(point: str, step: int | None) -> Fault | None:
    for fault in _faults:
        here = fault.rank in (None, int(os.environ.get("RANK", 0)))
        if fault.point == point and here and fault.step in (None, step):
            fault.times -= 1
            if fault.times == 0:
                _faults.remove(fault)
            return fault
    return None


def reach(point: str, step: int | None = None) -> None:
    """What the tests want to happen at this point."""
    if not _faults or not (fault := _due(point, step)):
        return
    if fault.kind == "raise":
        raise RuntimeError(f"FVTITAN_FAULTS at {point}")
    if fault.kind == "exit":
        os._exit(13)
    while fault.kind == "hang":
        time.sleep(1)
    while fault.kind == "freeze":
        ctypes.PyDLL(None).pause()
    os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)


def skips(point: str) -> bool:
    """Whether the tests want this call not to be made."""
    return bool(_faults) and _due(point, None) is not None


def spoil(point: str, value: Tensor, step: int | None = None) -> Tensor:
    """The tensor, or what the tests put in its place: a function of it, so that it has derivatives."""
    if not _faults or not (fault := _due(point, step)):
        return value
    return VALUES[fault.kind](value)


def spoil_gradient(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """The same to the gradient of the first parameter that has one here."""
    if _faults:
        first = next(p for p in parameters.values() if p.grad is not None)
        first.grad = spoil("gradient", first.grad, step)
