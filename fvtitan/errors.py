"""Errors meant for the person at the keyboard: one clear line, non-zero exit, no secrets."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")  # in an environment variable's name

EXIT_DISK_FULL = 74  # sysexits.h: EX_IOERR


class UserError(ValueError):
    """Bad input. The message names the key or file, the value, what is allowed and the nearest fix."""

    exit_status = 2  # errors that have one are said in one line


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the system had no room for what was written: the disk is full, or a quota or a limit on files is reached."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exit_status(error: BaseException) -> int:
    """What a program ends with after an error: 2 for bad input, 74 for a full disk, 1 for everything else."""
    return EXIT_DISK_FULL if is_disk_full(error) else getattr(error, "exit_status", 1)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or the sorted list of what is allowed when nothing is near."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else f" Allowed: {', '.join(options)}."


def nearest_multiples(value: int, multiple: int, offset: int = 0) -> str:
    """`"81 or 85"`: the positive numbers on both sides of `value` that are a multiple more than `offset`."""
    below = (value - offset) // multiple * multiple + offset
    options = [option for option in (below, below + multiple) if option > 0]
    return " or ".join(map(str, options or [offset or multiple]))


def redacted(text: str) -> str:
    """`text` with `***` for the value of every environment variable whose name says key, token, secret or password. Values
    shorter than 8 characters, and paths that exist, are none."""
    for name, value in os.environ.items():
        if not _SECRET.search(name.upper()) or len(value) < 8:
            continue
        for form in (value, repr(value)[1:-1], json.dumps(value)[1:-1]):
            if form in text and not os.path.exists(value):
                text = text.replace(form, "***")
    return text


def _print_exception(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, at))), end="", file=sys.stderr)


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first 20, and how many more there are."""
    names = list(names)
    return separator.join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def shortened(text: object, limit: int = 200) -> str:
    """Somebody's text for the one line of an error: cut at `limit` characters, with escapes for what cannot be printed."""
    text = str(text)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return line if len(text) <= limit else f"{line}..."


def cli(main: Callable[[], int | None]) -> None:
    """Run a program's `main`: an error that has an exit status (`UserError`: 2) becomes one line on stderr; a full disk ends
    with 74; other exceptions propagate, and torchrun shows that of the rank that failed first. None is printed with a secret
    in it."""
    sys.excepthook = _print_exception
    try:
        status = main()
    except Exception as error:
        if hasattr(error, "exit_status"):
            print(f"error: {redacted(str(error))}", file=sys.stderr)
        else:
            _tell_torchrun(error)
            if not is_disk_full(error):
                raise
            _print_exception(type(error), error, error.__traceback__)
        status = exit_status(error)
    sys.exit(status or 0)


def _tell_torchrun(error: Exception) -> None:
    """Write the error that is being handled where torchrun expects it, if torchrun has started this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        get_error_handler().record_exception(error)
        told = Path(path).read_text()
        Path(path).write_text(redacted(told))
    except OSError as failed:  # the error itself is the one to see
        print(f"WARNING: {path} cannot be written: {failed.strerror}", file=sys.stderr)
