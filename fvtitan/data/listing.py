"""What a folder of videos and captions, or a file of prompts, offers: everything is usable, or has its problem, before
anything is decoded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvtitan.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
FILE_KEYS = ("file_name", "path", "video_path", "video")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
IDENTITY_BYTES = 2**16
NUL_PROBLEM = "the line holds NUL: is the file UTF-16? need UTF-8"


@dataclass(frozen=True)
class Record:
    """One video of the data set: its path in the root, its caption and content identity, or why it cannot be used.

    One prompt of a file of prompts: `file` is the file's name and the line, as `prompts.txt:12`, and `caption` the prompt.
    """

    file: str
    caption: str = ""
    problem: str = ""
    identity: str = ""


def list_records(root: Path, exclude: Path | None = None) -> tuple[list[Record], list[Record]]:
    """What a folder offers, in a fixed order: the captioned videos, each usable or with its problem, and the files nobody
    asked to be used, such as videos that metadata.jsonl leaves out. Hidden files and the folder `exclude` do not count."""
    files, ignored = _walk(root, exclude)
    listed = "metadata.jsonl" in files
    if listed and _leaves(root, "metadata.jsonl"):
        raise UserError(f"--data {root}: metadata.jsonl is a link that leaves the data folder")
    candidates = _from_metadata(root / "metadata.jsonl") if listed else _from_pairs(root, files)
    records: list[Record] = []
    usable: dict[str, str] = {}  # real path -> the name it was listed under
    mentioned: set[str] = set()
    for record in candidates:
        problem = record.problem or _path_problem(root, record.file) or _caption_problem(record.caption)
        place = _real(root, record.file)
        mentioned.add(place)
        identity = ""
        if not problem and place in usable:
            problem = f"listed twice (it is {usable[place]})"
        if not problem:
            try:
                usable[place], identity = record.file, _identity(root / record.file)
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
        records.append(dataclasses.replace(record, problem=problem, identity=identity))
    for name in files:
        if listed and name != "metadata.jsonl" and _real(root, name) not in mentioned:
            ignored.append(Record(name, problem="not in metadata.jsonl"))
        elif not listed and not name.lower().endswith((*VIDEO_SUFFIXES, ".txt")):
            ignored.append(Record(name, problem=f"not a video (one of {', '.join(VIDEO_SUFFIXES)})"))
    return records, ignored


def list_prompts(path: Path) -> list[Record]:
    """The prompts of a file in its order, each usable or with its problem: one a line, or in `.jsonl` an object a line.

    Empty lines do not count; a prompt that is listed twice is two. Raises `UserError` when the file cannot be read or has
    no prompts.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read: {error.strerror}") from None
    name = path.name.encode("utf-8", "backslashreplace").decode()
    read = _prompts_from_jsonl if path.suffix.lower() == ".jsonl" else _prompts_from_text
    records = [
        dataclasses.replace(record, problem=record.problem or _caption_problem(record.caption))
        for record in read(name, content)
    ]
    if not records:
        raise UserError(f"--prompts {path}: no prompts in it: need one a line")
    return records


def _walk(root: Path, exclude: Path | None) -> tuple[list[str], list[Record]]:
    """Paths of the visible files under `root`, sorted, and the folders that are links, which are not followed."""
    files: list[str] = []
    links: list[Record] = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in [name for name in subfolders if (here / name).is_symlink()]:
            links.append(Record((here / name).relative_to(root).as_posix(), problem="a link to a folder: not followed"))
        subfolders[:] = [name for name in subfolders if exclude is None or (here / name).resolve() != exclude.resolve()]
        files += [(here / name).relative_to(root).as_posix() for name in names if name[0] != "."]
    return sorted(files), sorted(links, key=lambda link: link.file)


def _from_metadata(path: Path) -> Iterator[Record]:
    for where, entry, problem in _json_lines(path.name, path.read_bytes()):
        file = next((entry[key] for key in FILE_KEYS if key in entry), None)
        if problem:
            yield Record(where, problem=problem)
        elif not isinstance(file, str) or not file:
            yield Record(where, problem=f"no file: need one of the keys {', '.join(FILE_KEYS)}")
        else:
            yield _captioned(_plain(file), entry)


def _prompts_from_jsonl(name: str, content: bytes) -> Iterator[Record]:
    for where, entry, problem in _json_lines(name, content):
        yield Record(where, problem=problem) if problem else _captioned(where, entry)


def _prompts_from_text(name: str, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            prompt = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            yield Record(f"{name}:{number}", problem="the line is not UTF-8")
            continue
        if prompt:
            yield Record(f"{name}:{number}", prompt, problem=NUL_PROBLEM if "\0" in prompt else "")


def _json_lines(name: str, content: bytes) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where each line that is not empty lies (`name:12`), and the object in it, or the problem with it."""
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        entry, problem = {}, ""
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            problem = "the line is not UTF-8"
        except (ValueError, RecursionError) as error:
            problem = f"the line is not JSON: {error}"
        if not isinstance(entry, dict):
            entry, problem = {}, "the line is not a JSON object"
        yield f"{name}:{number}", entry, problem


def _captioned(file: str, entry: dict[str, Any]) -> Record:
    caption = next((entry[key] for key in CAPTION_KEYS if key in entry), None)
    if not isinstance(caption, str):
        return Record(file, problem=f"no caption: need one of the keys {', '.join(CAPTION_KEYS)}")
    return Record(file, caption)


def _plain(file: str) -> str:
    """`./a//b.mp4` -> `a/b.mp4`: one name for one file."""
    return file if "://" in file else Path(file).as_posix()


def _from_pairs(root: Path, files: list[str]) -> Iterator[Record]:
    videos = [name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
    for name in videos:
        text = (root / name).with_suffix(".txt")
        if not text.is_file():
            yield Record(name, problem=f"no caption: {text.name} does not exist")
            continue
        if _leaves(root, text.relative_to(root).as_posix()):
            yield Record(name, problem=f"the caption {text.name} leaves the data folder")
            continue
        try:
            yield Record(name, text.read_text(encoding="utf-8-sig").strip())
        except UnicodeDecodeError:
            yield Record(name, problem=f"the caption {text.name} is not UTF-8")
        except OSError as error:
            yield Record(name, problem=f"the caption {text.name} cannot be read: {error.strerror}")
    captioned = {Path(name).with_suffix(".txt").as_posix() for name in videos}
    for name in files:
        if name.lower().endswith(".txt") and name not in captioned:
            yield Record(name, problem="a caption without a video")


def _path_problem(root: Path, file: str) -> str:
    if "\0" in file or "://" in file:
        return "not a local file name"
    if not _is_text(file):
        return "the file name is not UTF-8"
    if Path(file).is_absolute():
        return "an absolute path: need one relative to the data folder"
    if _leaves(root, file):
        return "the path leaves the data folder"
    return "" if os.path.isfile(root / file) else "no such file"


def _real(root: Path, file: str) -> str:
    """Where a name leads, through all links; the name itself when no file system can hold it."""
    try:
        return os.path.realpath(root / file)
    except ValueError:
        return file


def _leaves(root: Path, file: str) -> bool:
    return not Path(_real(root, file)).is_relative_to(os.path.realpath(root))


def _caption_problem(caption: str) -> str:
    if not _is_text(caption):
        return "the caption is not Unicode text (half a surrogate pair)"
    return "" if caption.strip() else "the caption is empty"


def _is_text(string: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in string)


def _identity(path: Path) -> str:
    """Cheap content identity of a source: size, beginning and end (an index of all frames lies in one of them)."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(IDENTITY_BYTES))
        file.seek(max(0, size - IDENTITY_BYTES))
        digest.update(file.read(IDENTITY_BYTES))
    return f"{size}:{digest.hexdigest()}"
