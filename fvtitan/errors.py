"""Errors meant for the person at the keyboard: one clear line, non-zero exit, no secrets."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType

_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")  # in an environment variable's name


class UserError(ValueError):
    """Bad input. The message names the key or file, the value, what is allowed and the nearest fix."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or the sorted list of what is allowed when nothing is near."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else f" Allowed: {', '.join(options)}."


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


def cli(main: Callable[[], int | None]) -> None:
    """Run a program's `main`: a `UserError` becomes one line on stderr and exit status 2; other exceptions propagate. None is
    printed with a secret in it."""
    sys.excepthook = _print_exception
    try:
        status = main()
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)
