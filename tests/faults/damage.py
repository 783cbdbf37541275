"""Damage drawn from a seeded generator: to bytes, to lines, to values in JSON and TOML, to the files of a folder."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
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


# -------------------------------------------------------------------------------------------------------------- JSON

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, -(2**31), 2**63, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"), "",
    "1", "x", "\0", "\ud800", "é\u2028", "../x", "/etc/passwd", "shard-00000.safetensors", "step-2", "x" * 10**5, [], [1],
    [[]], ["x"], [-1], [2**40, 2**40], [0], {}, {"x": 1}, {"": []},
]  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything in a tree."""
    found: list[tuple[Any, Any]] = []
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found.append((tree, key))
        found += places(tree[key])
    return found


def damaged_tree(draws: random.Random, tree: Any) -> tuple[Any, str]:
    """A tree of dicts and lists (changed in place) with one value, key or element that is another."""
    kind = draws.choice(("value", "value", "value", "number", "remove", "rename", "swap", "wrap", "whole"))
    spots = places(tree)
    if kind == "whole" or not spots:
        value = draws.choice(VALUES)
        return value, f"all of it is {value!r:.60}"
    box, key = draws.choice(spots)
    before = box[key]
    if kind == "remove":
        del box[key]
    elif kind == "rename" and isinstance(box, dict):
        box[draws.choice(("x", "", f"{key} ", f"{key}0", "a.b"))] = box.pop(key)
    elif kind == "swap":
        other, there = draws.choice(spots)
        box[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(before)
    elif kind == "wrap":
        box[key] = draws.choice(([before], {"x": before}, [before, before], str(before)))
    elif kind == "number" and isinstance(before, int | float) and not isinstance(before, bool):
        box[key] = draws.choice(
            (-before, before + 1, before - 1, 2 * before, float(before), before * 10**9, str(before))
        )
    else:
        box[key] = draws.choice(VALUES)
    return tree, f"{kind} {key!r:.60}: {before!r:.60} -> {box.get(key) if isinstance(box, dict) else box!r:.60}"


def damaged_json(draws: random.Random, text: str) -> tuple[str, str]:
    """Another value, or JSON that is odd as a text."""
    kind = draws.randrange(12)
    if kind == 0:
        return "[" * 10**5 + "]" * 10**5, "100,000 lists in each other"
    if kind == 1:
        return '{"a":' * 50_000 + "1" + "}" * 50_000, "50,000 objects in each other"
    if kind == 2:
        at = text.find(":") + 1
        return text[:at] + "9" * 5000 + text[at:], "5,000 digits before the first value"
    if kind == 3:
        return json.dumps(json.loads(text), indent=draws.choice((None, 3))), "the same, laid out otherwise"
    tree, done = damaged_tree(draws, json.loads(text))
    return json.dumps(tree), done


def damaged_json_lines(draws: random.Random, text: str) -> tuple[str, str]:
    """One of the lines damaged, or their order."""
    if draws.random() < 0.3:
        return damaged_lines(draws, text)
    lines = text.splitlines()
    at = draws.randrange(len(lines))
    lines[at], done = damaged_json(draws, lines[at])
    return "".join(f"{line}\n" for line in lines), f"line {at}: {done}"


def damaged_safetensors(draws: random.Random, content: bytes) -> tuple[bytes, str]:
    """Another header, of the right length or of a wrong one."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    if draws.random() < 0.2:
        size = draws.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**62, 2**64 - 1))
        return size.to_bytes(8, "little") + content[8:], f"header of {size} bytes"
    text, done = damaged_json(draws, header.decode())
    header = text.encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data, f"header: {done}"


# ------------------------------------------------------------------------------------------------------------- files


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: dict[str, bytes | Path | None]) -> None:
    """The folder anew. In place of a file there may be a folder (None) or a link."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            (folder / name).mkdir()
        elif isinstance(content, Path):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)


def damaged_files(draws: random.Random, files: dict[str, Any]) -> tuple[str, str]:
    """Damage one of the files, in place; (its name, what was done)."""
    name = draws.choice(sorted(files))
    kind = draws.choice(("file", "bytes", "bytes", "inside", "inside", "inside"))
    if kind == "file":
        other = draws.choice(sorted(files))
        done = draws.choice(
            ("removed", "empty", "a folder", "a link to itself", f"{other}'s content", f"swapped with {other}")
        )
        before = files.pop(name)
        if done == "empty":
            files[name] = b""
        elif done == "a folder":
            files[name] = None
        elif done == "a link to itself":
            files[name] = Path(Path(name).name)
        elif done.endswith("content"):
            files[name] = files.get(other, before)
        elif done != "removed":
            files[name], files[other] = files.get(other, before), before
        return name, done
    damage = {".json": damaged_json, ".jsonl": damaged_json_lines}.get(Path(name).suffix)
    if kind == "inside" and damage:
        text, done = damage(draws, files[name].decode())
        files[name] = text.encode("utf-8", "surrogatepass")
    elif kind == "inside" and name.endswith(".safetensors"):
        files[name], done = damaged_safetensors(draws, files[name])
    else:
        files[name], done = damaged_bytes(draws, files[name])
    return name, done
