"""train.py as one rank that writes down how far it is, and kills itself where it is told to."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvtitan import models
from fvtitan.components import faults
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.distributed import utils


def kill_oneself(folder: Path, *, victim: int = -1, point: str = "", number: int = 0, delay: float = 0.0) -> None:
    """`events.rank<r>` gets a line, time and name, at each point of `faults` that the rank reaches, and in its start-up.
    Rank `victim` kills itself when it is at `point` (any, if empty) for the `number`-th time, or `delay` seconds after."""
    rank = int(os.environ["RANK"])
    seen = 0
    lines = open(folder / f"events.rank{rank}", "w", buffering=1)

    def reached(name: str) -> None:
        nonlocal seen
        lines.write(f"{time.monotonic()} {name}\n")
        seen += point in ("", name)
        if (rank, seen) != (victim, number) or point not in ("", name):
            return
        if not delay:
            os.kill(os.getpid(), signal.SIGKILL)
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    def announced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **keys: Any) -> Any:
            reached(name)
            return function(*args, **keys)

        return call

    reach = faults.reach
    faults.reach = lambda point, step=None: reached(point) or reach(point, step)
    models.build_roles = announced("start-up: networks", models.build_roles)
    Checkpointer.find = announced("start-up: find", Checkpointer.find)
    Checkpointer.load = announced("start-up: load", Checkpointer.load)
    utils.init_distributed = announced("start-up: process group", utils.init_distributed)
    reached("start-up: begin")
