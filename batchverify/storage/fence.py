"""A folder that no file may lie outside of: where an open file really lies, as the operating system says."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

# Bytes of a path on macOS.
_LONGEST_PATH = 1024


class Fence:
    """The folder `root`, which may itself be a symbolic link.

    A path is not enough to know where a file lies: symbolic links inside the folder may lead out of it, and they may
    change between a look and a read. So the file is opened first and then asked for. Hard links cannot be told from
    files of the folder.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._real: bytes | None = None

    def holds(self, descriptor: int, path: str) -> bool:
        """Whether an open file lies in the folder. path: the one by which it was opened. Raises OSError."""
        real = _path_of(descriptor, path)
        # The folder is looked up again before a file is refused: it may be a link that was changed meanwhile.
        return self._is_inside(real, self._real) or self._is_inside(real, self._look())

    def is_left_by(self, path: str) -> bool:
        """Whether symbolic links in a path lead out of the folder, be there a file or not."""
        try:
            return not self._is_inside(os.fsencode(os.path.realpath(path)), self._look())
        except (OSError, ValueError):  # no such folder; a NUL in the path
            return False

    def refusal(self, path: str) -> str:
        """The message for a path that leaves the folder."""
        return f"{path}: a symbolic link leads out of the image root {self.root}; see --follow-symlinks"

    def _look(self) -> bytes:
        descriptor = os.open(self.root, getattr(os, "O_PATH", os.O_RDONLY))
        try:
            self._real = _path_of(descriptor, self.root)
        finally:
            os.close(descriptor)
        return self._real

    @staticmethod
    def _is_inside(path: bytes, folder: bytes | None) -> bool:
        return folder is not None and path.startswith(folder.rstrip(b"/") + b"/")


def _path_of(descriptor: int, opened: str) -> bytes:
    """The path of an open file, without symbolic links. Raises OSError."""
    with suppress(OSError):
        return os.readlink(b"/proc/self/fd/%d" % descriptor)  # noqa: PTH115  bytes: names may be in any encoding
    request = getattr(fcntl, "F_GETPATH", None)  # macOS
    if request is not None:
        return fcntl.fcntl(descriptor, request, bytes(_LONGEST_PATH)).rstrip(b"\0")
    real = os.path.realpath(os.fsencode(opened))
    if not os.path.samestat(os.stat(real), os.fstat(descriptor)):  # noqa: PTH116  bytes
        raise OSError(f"{opened}: it changed while it was opened")
    return real
