"""Damage drawn from a seeded generator: to bytes, to lines, to values in JSON and TOML, to the files of a folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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


# ------------------------------------------------------------------------------------------------------ checkpoints


class Mischief:
    """Unpickled by anybody but us, it writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


def damaged_index(draws: random.Random, content: bytes, sentinel: Path) -> tuple[bytes, str]:
    """A checkpoint's `.metadata`, a pickle, with another value in one of its records."""
    index = pickle.loads(content)  # ours, as it was written
    tensors, stored = index.state_dict_metadata, index.storage_data
    name, key = draws.choice(sorted(tensors)), draws.choice(sorted(stored, key=str))
    chunks = tensors[name].chunks
    numbers = (-1, 0, 1, 7, 2**31, 2**40, 2**62, 10**30, None, "x", 1.5, float("nan"))
    sizes = (torch.Size([]), torch.Size([2**40]), torch.Size([8]), [8], (8, -1), None, torch.Size([2**20, 2**20]), "x")
    kind = draws.randrange(16)
    other = draws.choice(numbers)
    if kind == 0:
        tensors[name].size = other = draws.choice(sizes)
    elif kind == 1:
        chunks[0] = dataclasses.replace(chunks[0], sizes=(other := draws.choice(sizes)))
    elif kind == 2:
        chunks[0] = dataclasses.replace(chunks[0], offsets=(other := draws.choice(sizes)))
    elif kind == 3:
        stored[key] = dataclasses.replace(stored[key], offset=other)
    elif kind == 4:
        stored[key] = dataclasses.replace(stored[key], length=other)
    elif kind == 5:
        other = draws.choice(("../state.json", "/etc/passwd", "state.json", "", "\0", None, 3, "nowhere", ".metadata"))
        stored[key] = dataclasses.replace(stored[key], relative_path=other)
    elif kind == 6:
        other = draws.choice((torch.float64, torch.bfloat16, torch.int8, torch.bool, None, "x", 3))
        tensors[name].properties = dataclasses.replace(tensors[name].properties, dtype=other)
    elif kind == 7:
        del tensors[name]
    elif kind == 8:
        del stored[key]
    elif kind == 9:
        tensors[draws.choice((name + "x", "", "x.y"))] = tensors[name]
    elif kind == 10:
        tensors[name].chunks = other = draws.choice(([], None, 2 * chunks, chunks * 3, [None], "x"))
    elif kind == 11:
        other = draws.choice(sorted(stored, key=str))
        stored[key], stored[other] = stored[other], stored[key]
    elif kind == 12:
        other = draws.choice(("state_dict_metadata", "storage_data", "planner_data", "storage_meta"))
        setattr(index, other, draws.choice((None, [], {}, 3, {"x": 1}, {1: 2})))
    elif kind == 13:
        other = draws.choice(("state_dict_metadata", "storage_data"))
        setattr(index, other, {**getattr(index, other), draws.choice(("x", 1, None)): draws.choice((None, 1, "x", []))})
    elif kind == 14:
        other = draws.choice(("planner_data", "storage_meta"))
        setattr(index, other, Mischief(sentinel))
    else:
        stored[key] = dataclasses.replace(
            stored[key], transform_descriptors=(other := draws.choice((["zlib"], "x", 3)))
        )
    return pickle.dumps(index), f"record {kind} of {name}: {other!r:.60}"


def damaged_pickle(draws: random.Random, sentinel: Path) -> tuple[bytes, str]:
    """A pickle that is no index at all."""
    value = draws.choice(
        (Mischief(sentinel), [Mischief(sentinel)], None, 3, "x", {}, [], torch.Size([3]), torch.float32)
    )
    recursive: list[Any] = []
    recursive.append(recursive)
    content = draws.choice(
        (
            pickle.dumps(value, protocol=draws.choice((0, 2, 4))),
            pickle.dumps(recursive),
            b"\x80\x04" + b"(" * 10**5 + b".",
            b"cos\nsystem\n(S'true'\ntR.",
            b"ctorch\nload\n.",
            b"ctorch\nSize\n((I99999999999999\nttR.",
            b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"),  # a bytes object of that size
            b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",  # a frame of that size
        )
    )
    return content, f"another pickle: {content[:40]!r}"
