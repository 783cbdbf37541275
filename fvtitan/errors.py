"""Errors meant for the person at the keyboard: one clear line, non-zero exit."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message names the key or file, the value, what is allowed and the nearest fix."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or the sorted list of what is allowed when nothing is near."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else f" Allowed: {', '.join(options)}."


def shortened(text: object, limit: int = 200) -> str:
    """Somebody's text for the one line of an error: cut at `limit` characters, with escapes for what cannot be printed."""
    text = str(text)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return line if len(text) <= limit else f"{line}..."


def cli(main: Callable[[], int | None]) -> None:
    """Run a program's `main`: a `UserError` becomes one line on stderr and exit status 2; other exceptions propagate."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)
