"""What the system knows of this process: when it began, whose child it is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IMPORTED = time.time()


def process_start() -> float:
    """When this process began, in seconds since 1970, to 0.01 s; other systems than Linux: when this module was read."""
    if sys.platform != "linux":
        return _IMPORTED
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third on: proc(5)
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def end_with_parent(number: signal.Signals) -> None:
    """Let this process get the signal when the one that started it dies. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
