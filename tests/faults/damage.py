"""Damage drawn from a seeded generator: to bytes, to lines, to values in JSON and TOML, to the files of a folder."""

from __future__ import annotations

import json
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, BYTES = 20, 2 * 2**30  # an input may take, and may allocate beyond what the process has


class TookTooLong(BaseException):
    """Not an Exception: nothing may catch it by the way."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, what takes longer than SECONDS or allocates more than BYTES raises."""

    def ring(*_: Any) -> None:
        raise TookTooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ----------------------------------------------------------------------------------------------------- bytes, lines


def damaged_bytes(draws: random.Random, content: bytes) -> tuple[bytes, str]:
    """(other content, what was done to it)."""
    start = draws.randrange(len(content) + 1)
    size = draws.choice((1, 2, 8, 100, 5000))
    kind = draws.choice(("flip", "flip", "flip", "truncate", "insert", "remove", "repeat", "zero", "empty", "grow"))
    end = min(start + size, len(content))
    if kind == "flip" and content:
        changed = bytearray(content)
        for _ in range(draws.choice((1, 1, 1, 4))):
            changed[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        return bytes(changed), "flipped bits"
    changed = {
        "truncate": content[:start],
        "insert": content[:start] + draws.choice((draws.randbytes(size), b"\0", b"\xff", b"\n")) + content[start:],
        "remove": content[:start] + content[end:],
        "repeat": content[:end] + content[start:],
        "zero": content[:start] + bytes(end - start) + content[end:],
        "grow": content + draws.randbytes(size),
    }
    return changed.get(kind, b""), f"{kind} at {start}, {size} bytes"


def damaged_lines(draws: random.Random, text: str) -> tuple[str, str]:
    """Lines removed, repeated, swapped or moved."""
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:
        return text * 2, "the only line twice"
    i, j = sorted(draws.sample(range(len(lines)), 2))
    kind = draws.choice(("remove", "repeat", "swap", "move"))
    if kind == "remove":
        del lines[i]
    elif kind == "repeat":
        lines.insert(j, lines[i])
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines.insert(i, lines.pop(j))
    return "".join(lines), f"{kind} lines {i} and {j}"
