"""Progress of long work, in lines that a log file can hold."""

from __future__ import annotations

import time

from fvtitan.components.metrics import duration

PROGRESS_SECONDS = 10


class Progress:
    """A plain line every PROGRESS_SECONDS, and at the end."""

    def __init__(self, name: str, total: int, unit: str, *, quiet: bool):
        self.name, self.total, self.unit, self.quiet = name, total, unit, quiet
        self.done, self.start = 0, time.monotonic()
        self.printed = self.start

    def add(self, count: int) -> None:
        """`count` more are done."""
        if not count:
            return
        self.done += count
        now = time.monotonic()
        if not self.quiet and (self.done == self.total or now - self.printed > PROGRESS_SECONDS):
            self.printed = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.name}: {self.done}/{self.total} {self.unit}, {duration(left)} left", flush=True)
