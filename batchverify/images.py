"""Manifest cells as absolute paths and URIs: the rules of which are read, one by one and by the batch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from batchverify.errors import UsageError
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location, scheme_of
from batchverify.storage.object_store import SCHEMES

_DATA_URI = re.compile(r"data:[^/]*(/[^/]*)?[;,]", re.IGNORECASE)
# Cells come back in messages; a data: URI may hold megabytes.
_SHOWN = 120


@dataclass(frozen=True)
class ImageRoot:
    """Where the relative paths of a manifest start.

    A root that the user named (`fenced`) is a fence: no path outside it is read (symbolic links inside it
    are followed: whoever owns the folder made them). The manifest's own folder is none:
    `../pictures/a.jpg` and absolute paths are fine in a local manifest. A manifest in an object store
    never reads this machine's files. URIs of the root's scheme inherit its options (endpoint, region).
    """

    root: Location
    fenced: bool = False

    def resolve(self, cell: str | None) -> str | Skipped:
        """A manifest cell as an absolute path or URI, or the reason why it is refused."""
        if cell is None or not cell.strip():
            return Skipped(Reason.NOT_FOUND, "the cell is empty")
        scheme = "data" if _DATA_URI.match(cell) else scheme_of(cell)
        if scheme and scheme not in ("file", *SCHEMES):
            return Skipped(Reason.FORBIDDEN, f"scheme '{scheme}' is not read: {_short(cell)}")
        try:
            location = self._absolute(cell, scheme)
        except UsageError as exc:
            return Skipped(Reason.FORBIDDEN, _short(str(exc)))
        if "\0" in location.path:
            return Skipped(Reason.FORBIDDEN, "the path holds a NUL character")
        if location.is_local and not self.root.is_local:
            message = f"a local file, though the image root is in an object store: {_short(cell)}"
            return Skipped(Reason.FORBIDDEN, message)
        if self.fenced and not self._inside(location):
            return Skipped(Reason.FORBIDDEN, f"outside the image root {self.root}: {_short(cell)}")
        return str(location)

    def _absolute(self, cell: str, scheme: str) -> Location:
        if scheme:
            location = Location.parse(cell)
            inherits = location.scheme == self.root.scheme and not location.query
            return replace(location, query=self.root.query) if inherits else location
        if not self.root.is_local:
            return Location(cell) if cell.startswith("/") else self.root.join(cell).normal()
        return Location(os.path.normpath(os.path.join(self.root.path, cell)))  # noqa: PTH118  lexical on purpose

    def _inside(self, location: Location) -> bool:
        fence = self.root.path.rstrip("/") + "/"
        # Other options may mean another server: equal bucket names would not be the same bucket.
        same_store = (location.scheme, location.query) == (self.root.scheme, self.root.query)
        return same_store and location.path.startswith(fence)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
