"""Temporary files and folders of killed processes, and how a later run knows them: nobody holds their lock any more.

The kernel releases a lock however its process ends. A lock is seen for certain only under the same kernel, so names
state it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO

_UNIQUE = 8
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# The locks of this process by the paths of their files.
_held: dict[str, IO[bytes]] = {}


@lru_cache(maxsize=1)
def _kernel() -> str:
    """What tells this start of this machine from others, in 8 characters."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        name = socket.gethostname()
    return sha256(name.encode()).hexdigest()[:8]


def temporary_name(name: str) -> str:
    """A unique hidden name for a temporary file that will become `name`."""
    return f".{name}.{_kernel()}{uuid.uuid4().hex[:_UNIQUE]}.tmp"


def writing_to(path: Path) -> IO[bytes]:
    """A new file, held until it is closed. Raises OSError."""
    while True:
        file = path.open("xb")
        try:
            if _is_locked_in_time(file.fileno(), path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def hold(path: Path) -> None:
    """Create an empty file that is held until `drop`, or until this process ends. Raises OSError."""
    _held[str(path)] = writing_to(path)


def drop(path: Path) -> None:
    """Remove a file that `hold` created, if it is still there. Raises OSError."""
    path.unlink(missing_ok=True)
    if (file := _held.pop(str(path), None)) is not None:
        file.close()


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A new folder of the machine's temporary one, for the block. Raises OSError.

    name: what it is for. A killed process cannot delete its own; the next block of this name does.
    """
    parent = Path(tempfile.gettempdir())
    _sweep_folders(parent, name)
    path, descriptor = _create_folder(parent, name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files whose processes are gone. name: only those that were to become this file.

    What cannot be seen or removed stays.
    """
    for path in _ours(folder, name):
        with suppress(OSError):
            _remove_abandoned(path)


def _sweep_folders(parent: Path, name: str) -> None:
    """Remove the folders of this name whose processes are gone; those of other users stay."""
    for path in _ours(parent, name):
        with suppress(OSError):
            descriptor = os.open(path, _FOLDER)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _ours(folder: Path, name: str) -> list[Path]:
    """What `temporary_name` may have named in a folder, under this kernel; name: empty for all."""
    ours = re.compile(rf"\.{re.escape(name) or '.*'}\.{_kernel()}[0-9a-f]{{{_UNIQUE}}}\.tmp")
    with suppress(OSError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]
    return []


def _create_folder(parent: Path, name: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        path = parent / temporary_name(name)
        path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            descriptor = os.open(path, _FOLDER)
            if _is_locked_in_time(descriptor, path):
                return path, descriptor
            os.close(descriptor)


def _lock(descriptor: int, wait: int = fcntl.LOCK_NB) -> bool | None:
    """Whether a file or folder is locked now, by this process; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_locked_in_time(descriptor: int, path: Path) -> bool:
    """Lock what was just made. False if another run took it for abandoned, held it for a moment, and removed it."""
    return _lock(descriptor, wait=0) is None or is_named(descriptor, path)


def is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path) -> None:
    with path.open("rb") as file:
        if _lock(file.fileno()):
            path.unlink()
