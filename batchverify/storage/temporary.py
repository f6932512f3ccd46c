"""Temporary files that a killed process leaves, and how a later run knows them: their process no longer holds a lock.

The kernel releases a lock however its process ends. A lock is seen for certain only under the same kernel, so names
state it.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO

_UNIQUE = 8
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


@contextmanager
def writing_to(path: Path) -> Iterator[IO[bytes]]:
    """A new file, held while the block runs. Raises OSError."""
    file = _create(path)
    try:
        yield file
    finally:
        file.close()


def hold(path: Path) -> None:
    """Create an empty file that is held until `drop`, or until this process ends. Raises OSError."""
    _held[str(path)] = _create(path)


def drop(path: Path) -> None:
    """Remove a file that `hold` created, if it is still there. Raises OSError."""
    path.unlink(missing_ok=True)
    if (file := _held.pop(str(path), None)) is not None:
        file.close()


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files whose processes are gone. name: only those that were to become this file.

    What cannot be seen or removed stays.
    """
    ours = re.compile(rf"\.{re.escape(name) or '.*'}\.{_kernel()}[0-9a-f]{{{_UNIQUE}}}\.tmp")
    with suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]:
            with suppress(OSError):
                _remove_abandoned(path)


def _create(path: Path) -> IO[bytes]:
    while True:
        file = path.open("xb")
        try:
            if _lock(file) is None or is_named(file.fileno(), path):
                return file
        except BaseException:
            file.close()
            raise
        # Another run took it for abandoned before it was locked.
        file.close()


def _lock(file: IO[bytes]) -> bool | None:
    """Whether a file is locked now, by this process; None where there are no locks."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path) -> None:
    with path.open("rb") as file:
        if _lock(file):
            path.unlink()
