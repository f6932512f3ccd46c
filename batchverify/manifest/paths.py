"""Manifest cells as absolute paths and URIs: the rules of what is read, cell by cell and by the batch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import UsageError
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location, scheme_of
from batchverify.storage.object_store import SCHEMES

_DATA_URI = re.compile(r"data:[^/]*(/[^/]*)?[;,]", re.IGNORECASE)
# Cells come back in messages; a data: URI may hold megabytes.
_SHOWN = 120
# What may stand before a path that no rule looks at.
_LEAD = re.compile(
    r"(?:\.\.?/)+|/|(?:s3|gs|gcs)://[a-zA-Z0-9][a-zA-Z0-9._-]*/|abfss?://[a-zA-Z0-9][a-zA-Z0-9-]*@[a-zA-Z0-9.-]+/|"
)
# Cells of a batch that show which leads it has. Each lead costs a look at all cells.
_SAMPLE = 16
_REFUSED = b"\0"
_WORD = np.zeros(256, np.bool_)
_WORD[list(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")] = True


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


def resolve_many(root: ImageRoot, cells: pa.Array) -> pa.Array:
    """The references of (N,) string cells, as bytes of `to_bytes`: (N,) large_binary without nulls."""
    values = cells.cast(pa.large_binary())
    texts, left = pa.nulls(len(cells), pa.large_binary()), np.ones(len(cells), np.bool_)
    for lead in _leads(cells):
        frame = _frame(root, lead)
        if frame is not None:
            joined = _framed(frame, lead, values)
            good = left & _plain(values, lead) & _inside(root, frame[1], joined)
            if good.all():
                return joined
            texts, left = pc.if_else(pa.array(good), joined, texts), left & ~good
    # What is odd, and leads that are rare.
    others = cells.filter(pa.array(left)).dictionary_encode(null_encoding="encode")
    resolved = pa.array(
        [to_bytes(root.resolve(cell)) for cell in others.dictionary.to_pylist()], pa.large_binary()
    )
    return pc.replace_with_mask(texts, pa.array(left), resolved.take(others.indices))


def to_bytes(reference: str | Skipped) -> bytes:
    """A reference as bytes; refusals start with NUL, which no reference holds."""
    if isinstance(reference, Skipped):
        return _REFUSED + f"{reference.reason.value}\0{reference.message}".encode("utf-8", "surrogatepass")
    return reference.encode("utf-8", "surrogatepass")


def from_bytes(text: bytes) -> str | Skipped:
    """The reference that `to_bytes` made these of."""
    decoded = text.decode("utf-8", "surrogatepass")
    if not text.startswith(_REFUSED):
        return decoded
    reason, _, message = decoded[1:].partition("\0")
    return Skipped(Reason(reason), message)


def _frame(root: ImageRoot, lead: str = "") -> tuple[bytes, bytes] | None:
    """What stands before and after the rest of a cell that starts with `lead`; None where it is refused."""
    probe = ImageRoot(root.root).resolve(f"{lead}x")
    if isinstance(probe, Skipped):
        return None
    query = root.root.query if probe.endswith(f"x{root.root.query}") else ""
    head = probe.removesuffix(query)
    return (to_bytes(head[:-1]), query.encode()) if head.endswith("x") else None


def _leads(cells: pa.Array) -> list[str]:
    """What some of the cells start with, each once."""
    sample = cells.take(pa.array(np.arange(0, len(cells), len(cells) // _SAMPLE + 1))).drop_null()
    return sorted({match.group() for match in map(_LEAD.match, sample.to_pylist()) if match})


def _plain(values: pa.Array, lead: str) -> np.ndarray:
    """Which of (N,) large_binary cells are `lead` and a path that no rule looks at: (N,) bool.

    Such a path ends with a letter or digit; none of its parts is empty, `.` or `..`, or holds a colon, a
    question mark or NUL. A few that start with dots are left out, too.
    """
    borders, data = borders_and_bytes(values)
    starts, ends = borders[:-1] + len(lead), borders[1:]
    plain = (starts < ends) & values.is_valid().to_numpy(zero_copy_only=False)
    if not plain.any():
        return plain
    if lead:
        plain &= pc.starts_with(values, lead).fill_null(False).to_numpy(zero_copy_only=False)
    head = data[np.minimum(starts, len(data) - 1)]
    plain &= _WORD[data[ends - 1]] & (head != ord("/")) & (head != ord("."))
    data, last = data[borders[0] : borders[-1]], borders[-1] - borders[0] - 1
    slashes = np.flatnonzero(data == ord("/"))
    second, third = (data[np.minimum(slashes + step, last)] for step in (1, 2))
    bad = [slashes[(second == ord("/")) | (second == ord(".")) & ((third == ord("/")) | (third == ord(".")))]]
    # Few manifests hold these at all: searched for first, which is faster by far.
    text = data.tobytes()
    bad += [np.flatnonzero(data == each) for each in b":?\0" if each in text]
    places = np.sort(np.concatenate(bad)) + borders[0]
    rows = np.searchsorted(borders, places, "right") - 1
    plain[rows[places >= starts[rows]]] = False
    return plain


def _framed(frame: tuple[bytes, bytes], lead: str, values: pa.Array) -> pa.Array:
    """(N,) large_binary cells that start with `lead`, as references; the others come out as anything."""
    texts = pc.binary_replace_slice(values, 0, len(lead), frame[0])
    after, nothing = (pa.scalar(each, pa.large_binary()) for each in (frame[1], b""))
    return pc.binary_join_element_wise(texts, after, nothing) if frame[1] else texts


def _inside(root: ImageRoot, query: bytes, texts: pa.Array) -> np.ndarray:
    """Which references no fence keeps out: (N,) bool."""
    if not root.fenced:
        return np.ones(len(texts), np.bool_)
    if query.decode() != root.root.query:
        return np.zeros(len(texts), np.bool_)
    scheme = "" if root.root.is_local else f"{root.root.scheme}://"
    fence = to_bytes(scheme + root.root.path.rstrip("/") + "/")
    return pc.starts_with(texts, pattern=fence).fill_null(False).to_numpy(zero_copy_only=False)


def borders_and_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where large_binary texts begin and end, (N + 1,) int64, in (M,) uint8: the same memory, none copied."""
    _, borders, data = texts.buffers()
    if not len(texts) or data is None:
        return np.zeros(len(texts) + 1, np.int64), np.zeros(0, np.uint8)
    places = np.frombuffer(borders, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return places, np.frombuffer(data, np.uint8)
