"""Files that are either whole or absent, also after a crash or a power cut; and reading what others may have made."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def fsync_path(path: str | Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write beside the target under a temporary name, sync, and rename over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def is_temporary(path: Path, names: str) -> bool:
    """Whether `path` is what a killed `write_atomic` leaves of a file whose name matches the regular expression `names`."""
    return bool(re.fullmatch(rf"\.({names})\.\d+\.tmp", path.name)) and path.is_file()


def file_sha256(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(path: str | Path) -> tuple[int, str]:
    """Lock a file until its descriptor, which is returned, is closed or this process ends, and write into it who holds it.
    With it comes "", or why this file system has no locks. Raises `BlockingIOError`, whose strerror names the holder."""
    descriptor, unlocked = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        raise BlockingIOError(errno.EAGAIN, holder or "another process") from None
    except OSError as error:
        unlocked = error.strerror or repr(error)
    if not _is_at(descriptor, path):  # its holder removed it in between: what nobody finds locks nobody out
        os.close(descriptor)
        return lock_file(path)
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()} since {since}\n".encode(), 0)
    return descriptor, unlocked


def _is_at(descriptor: int, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def open_safetensors(path: str | Path) -> Any:
    """`safetensors.safe_open` for PyTorch, which checks that the header has a sane size and that the tensors fill the file
    without holes and overlaps. Of a name that is there twice it would take the last. Raises `SafetensorError` or `OSError`."""
    stored = safe_open(path, framework="pt")
    with open(path, "rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_unique)
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise SafetensorError(f"{max(names, key=names.count)!r} is in its header twice")
    return dict(pairs)


def inside(folder: str | Path, name: str) -> bool:
    """Whether `name` is that of a file directly in `folder`, also after following links."""
    folder = os.path.realpath(folder)
    return Path(name).name == name and os.path.dirname(os.path.realpath(os.path.join(folder, name))) == folder
