"""What a folder or a list of videos and captions, or a file of prompts, offers: everything is usable, or has its problem,
before anything is decoded."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvtitan.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
FILE_KEYS = ("file_name", "path", "video_path", "video")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
LISTS = ("metadata.jsonl", "metadata.csv")
LIST_SUFFIXES = (".jsonl", ".csv")
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


@dataclass(frozen=True)
class Keys:
    """How lists name their fields: the first of these that an entry has counts."""

    file: tuple[str, ...] = FILE_KEYS
    caption: tuple[str, ...] = CAPTION_KEYS


def data_root(source: Path) -> Path:
    """The folder that paths are relative to, and inside of which they must lie: the source, or that of a list."""
    return source if source.is_dir() else source.parent


def list_records(source: Path, exclude: Path | None = None, keys: Keys = Keys()) -> tuple[list[Record], list[Record]]:  # noqa: B008 (frozen)
    """What a folder, or a list (`.jsonl`, `.csv`), offers, in a fixed order: the captioned videos, each usable or with its
    problem, and the files of a folder that nobody asked to be used, such as videos that its metadata.jsonl leaves out.

    Hidden files and the folder `exclude` do not count. Raises `UserError` when the list cannot be read as one.
    """
    root = data_root(source)
    files, ignored = _walk(root, exclude) if source.is_dir() else ([], [])
    lists = [name for name in LISTS if name in files] if source.is_dir() else [source.name]
    if len(lists) > 1:
        raise UserError(f"--data {source} holds {' and '.join(lists)}: give the one that counts, as --data FILE")
    listed = lists[0] if lists else ""
    if source.is_dir() and listed and _leaves(root, listed):
        raise UserError(f"--data {source}: {listed} is a link that leaves the data folder")
    if not listed and keys != Keys():
        raise UserError(
            f"--file-key, --caption-key: for lists only, but {source} holds none of {', '.join(LISTS)}: leave out"
        )
    candidates = _from_list(root / listed, keys) if listed else _from_pairs(root, files)
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
        if listed and name != listed and _real(root, name) not in mentioned:
            ignored.append(Record(name, problem=f"not in {listed}"))
        elif not listed and not name.lower().endswith((*VIDEO_SUFFIXES, ".txt")):
            ignored.append(Record(name, problem=f"not a video (one of {', '.join(VIDEO_SUFFIXES)})"))
    return records, ignored


def with_videos(root: Path, records: Sequence[Record]) -> list[bool]:
    """Which records name a video that can be looked into: the usable ones, and those whose problem is another (no caption, say)
    and whose file no other record has."""
    places = {_real(root, record.file) for record in records if not record.problem}
    looked_into = []
    for record in records:
        place, video = _real(root, record.file), record.file.lower().endswith(VIDEO_SUFFIXES)
        alone = video and place not in places and not _path_problem(root, record.file)
        if alone:
            places.add(place)
        looked_into.append(not record.problem or alone)
    return looked_into


def list_prompts(path: Path, keys: Keys = Keys()) -> list[Record]:  # noqa: B008 (frozen)
    """The prompts of a file in its order, each usable or with its problem: one a line, in `.jsonl` an object a line, in `.csv`
    a row.

    Empty lines do not count; a prompt that is listed twice is two. Raises `UserError` when the file cannot be read or has
    no prompts.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read: {error.strerror}") from None
    name = path.name.encode("utf-8", "backslashreplace").decode()
    if path.suffix.lower() not in LIST_SUFFIXES and keys != Keys():
        raise UserError(
            f"--caption-key: for {' and '.join(LIST_SUFFIXES)} only, but {path} has a prompt a line: leave out"
        )
    read = {".jsonl": _prompts_from_jsonl, ".csv": _prompts_from_csv}.get(path.suffix.lower(), _prompts_from_text)
    records = [
        dataclasses.replace(record, problem=record.problem or _caption_problem(record.caption))
        for record in read(name, content, keys)
    ]
    if not records:
        raise UserError(f"--prompts {path}: no prompts in it: need one a line")
    return records


def _walk(root: Path, exclude: Path | None) -> tuple[list[str], list[Record]]:
    """Paths of the visible files under `root`, sorted, and the folders that are not looked into: links, and what cannot be
    read. Raises `UserError` for one that cannot be read when no list in `root` says what counts."""
    files: list[str] = []
    links: list[Record] = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root or not any(name in files for name in LISTS):
            raise UserError(f"--data {root}: {error.filename}: {error.strerror}")
        folder = Path(error.filename).relative_to(root).as_posix()
        links.append(Record(folder, problem=f"a folder that cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in [name for name in subfolders if (here / name).is_symlink()]:
            links.append(Record((here / name).relative_to(root).as_posix(), problem="a link to a folder: not followed"))
        subfolders[:] = [name for name in subfolders if exclude is None or (here / name).resolve() != exclude.resolve()]
        files += [(here / name).relative_to(root).as_posix() for name in names if name[0] != "."]
    return sorted(files), sorted(links, key=lambda link: link.file)


def _from_list(path: Path, keys: Keys) -> Iterator[Record]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}") from None
    table = path.suffix.lower() == ".csv"
    rows = _csv_rows(path, content, file=keys.file, caption=keys.caption) if table else _json_lines(path.name, content)
    for where, entry, problem in rows:
        file = next((entry[key] for key in keys.file if key in entry), None)
        if problem:
            yield Record(where, problem=problem)
        elif not isinstance(file, str) or not file:
            yield Record(where, problem=f"no file: need one of the keys {', '.join(keys.file)}")
        else:
            yield _captioned(_plain(file), entry, keys)


def _csv_rows(path: Path, content: bytes, **needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where each row begins (`name:12`), and its fields by the header's names, or the problem with it. `needed` are the names
    that a column may have, by what it holds.

    Raises `UserError` for what leaves no row certain: the header, or a quote that is never closed.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: the file is UTF-16: need UTF-8")
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    rows, end, header = csv.reader(io.StringIO(text, newline=""), strict=True), 0, None
    while True:
        fields, problem = [], ""
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(f"{path}: line {end + 1}: a quote that is opened there is never closed") from None
            if "field larger" in str(error):
                raise UserError(f"{path}: line {end + 1}: {error}: is a quote opened there and never closed?") from None
            problem = f"the row's quoting is wrong ({error}); a quote inside of quotes is written twice"
        line, end = end + 1, rows.line_num
        if header is None:
            _check_header(path, fields, problem, needed)
            header = fields
            continue
        if not fields and not problem:
            continue
        if not all(map(is_text, fields)):
            problem = "the row is not UTF-8"
        elif not problem and len(fields) != len(header):
            problem = f"{len(fields)} fields, the header has {len(header)}: a text with commas needs quotes"
        elif any("\0" in field for field in fields):
            problem = "the row holds NUL"
        yield f"{path.name}:{line}", {} if problem else dict(zip(header, fields, strict=True)), problem
    if header is None:
        raise UserError(f"{path}: the file is empty: need a header line such as path,caption")


def _check_header(path: Path, header: list[str], problem: str, needed: dict[str, tuple[str, ...]]) -> None:
    if problem or not all(map(is_text, header)):
        raise UserError(f"{path}: the header cannot be read: {problem or 'it is not UTF-8'}")
    where = f"{path}: the header {','.join(header)!r}"
    for what, names in needed.items():
        if not set(names) & set(header):
            raise UserError(f"{where} has no column {' or '.join(names)}: --{what}-key names another")
    if len(set(header)) < len(header):
        raise UserError(f"{where} has a column twice")


def _prompts_from_jsonl(name: str, content: bytes, keys: Keys) -> Iterator[Record]:
    for where, entry, problem in _json_lines(name, content):
        yield Record(where, problem=problem) if problem else _captioned(where, entry, keys)


def _prompts_from_csv(name: str, content: bytes, keys: Keys) -> Iterator[Record]:
    for where, entry, problem in _csv_rows(Path(name), content, caption=keys.caption):
        yield Record(where, problem=problem) if problem else _captioned(where, entry, keys)


def _prompts_from_text(name: str, content: bytes, keys: Keys) -> Iterator[Record]:
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


def _captioned(file: str, entry: dict[str, Any], keys: Keys) -> Record:
    caption = next((entry[key] for key in keys.caption if key in entry), None)
    if not isinstance(caption, str):
        return Record(file, problem=f"no caption: need one of the keys {', '.join(keys.caption)}")
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
    if not is_text(file):
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
    if not is_text(caption):
        return "the caption is not Unicode text (half a surrogate pair)"
    return "" if caption.strip() else "the caption is empty"


def is_text(string: str) -> bool:
    """Whether UTF-8 can hold it: no half of a surrogate pair, as which bytes that are not UTF-8 are read."""
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
