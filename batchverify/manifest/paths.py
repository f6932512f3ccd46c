"""Manifest cells as absolute paths and URIs: which are read, decided cell by cell or for whole batches."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import UsageError, redacted, shortened
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location, scheme_of
from batchverify.storage.object_store import AZURE_SCHEMES, SCHEMES, is_own_account

_DATA_URI = re.compile(r"data:[^/]*(/[^/]*)?[;,]", re.IGNORECASE)
# Characters of a cell in a message: a data: URI may hold megabytes.
_SHOWN = 120
# Prefixes of cells whose rest may be a plain path, to which no rule applies.
_PREFIX = re.compile(
    r"(?:\.\.?/)+|/|(?:s3|gs|gcs)://[a-zA-Z0-9][a-zA-Z0-9._-]*/|abfss?://[a-zA-Z0-9][a-zA-Z0-9-]*@[a-zA-Z0-9.-]+/|"
)
# Cells of a batch that are searched for prefixes. Each prefix costs a pass over all cells.
_SAMPLE = 16
_REFUSED = b"\0"
_WORD = np.zeros(256, np.bool_)
_WORD[list(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")] = True


@dataclass(frozen=True)
class ImageRoot:
    """Where the relative paths of a manifest start.

    A root that the user gave is a fence (`fenced`): no path outside it is read. Readers hold local files to it as
    well (`fence`), because only they see where symbolic links lead. The manifest's own folder is not a fence:
    `../images/a.jpg` and absolute paths are allowed in a local manifest. A manifest in an object store never reads
    local files. URIs with the root's scheme inherit its options (endpoint, region); a cell never brings its own.

    follow_symlinks: symbolic links may lead out of the fence.
    """

    root: Location
    fenced: bool = False
    follow_symlinks: bool = False

    @property
    def fence(self) -> str | None:
        """The folder that no file may lie outside of, wherever symbolic links lead; None if there is none."""
        return self.root.path if self.fenced and self.root.is_local and not self.follow_symlinks else None

    def resolve(self, cell: str | None) -> str | Skipped:
        """The absolute path or URI of a manifest cell, or the reason why the cell is refused."""
        if cell is None or not cell.strip():
            return Skipped(Reason.NOT_FOUND, "the cell is empty")
        scheme = "data" if _DATA_URI.match(cell) else scheme_of(cell)
        if scheme and scheme not in ("file", *SCHEMES):
            return Skipped(Reason.FORBIDDEN, f"scheme '{scheme}' is not read: {shortened(redacted(cell), _SHOWN)}")
        try:
            location = self._absolute(cell, scheme)
        except UsageError as exc:
            return Skipped(Reason.FORBIDDEN, shortened(exc, _SHOWN))
        if "\0" in location.path:
            return Skipped(Reason.FORBIDDEN, "the path holds a NUL character")
        if location.is_local and not self.root.is_local:
            message = f"a local file, though the image root is in an object store: {shortened(cell, _SHOWN)}"
            return Skipped(Reason.FORBIDDEN, message)
        if self.fenced and not self._inside(location):
            return Skipped(Reason.FORBIDDEN, f"outside the image root {self.root}: {shortened(cell, _SHOWN)}")
        return str(location)

    def _absolute(self, cell: str, scheme: str) -> Location:
        if scheme:
            location = Location.parse(cell)
            own_account = location.scheme in AZURE_SCHEMES and is_own_account(location.query)
            if location.query not in ("", self.root.query) and not own_account:
                raise _carries_options(location)
            inherits = location.scheme == self.root.scheme and not location.query
            return replace(location, query=self.root.query) if inherits else location
        if not self.root.is_local:
            location = Location(cell) if cell.startswith("/") else self.root.join(cell).normal()
            # Readers parse it again, and must not find options in its key.
            if not location.is_local and Location.parse(str(location)) != location:
                raise _carries_options(Location.parse(str(location)))
            return location
        return Location(os.path.normpath(os.path.join(self.root.path, cell)))  # noqa: PTH118  lexical on purpose

    def _inside(self, location: Location) -> bool:
        fence = self.root.path.rstrip("/") + "/"
        # Other options may mean another server, where a bucket of the same name is another bucket.
        same_store = (location.scheme, location.query) == (self.root.scheme, self.root.query)
        return same_store and location.path.startswith(fence)


def _carries_options(location: Location) -> UsageError:
    """The error for a cell with options: they choose the server that requests and credentials go to."""
    return UsageError(
        "a cell may name no server, account or other option, these come from --image-root or the environment: "
        f"{replace(location, query='')}"
    )


def resolve_many(root: ImageRoot, cells: pa.Array) -> pa.Array:
    """`ImageRoot.resolve` for (N,) string cells: (N,) large_binary without nulls, as `to_bytes` encodes."""
    values = cells.cast(pa.large_binary())
    texts, left = pa.nulls(len(cells), pa.large_binary()), np.ones(len(cells), np.bool_)
    for prefix in _prefixes(cells):
        frame = _frame(root, prefix)
        if frame is not None:
            joined = _join(frame, prefix, values)
            resolved = left & _is_plain(values, prefix) & _is_inside(root, frame[1], joined)
            if resolved.all():
                return joined
            texts, left = pc.if_else(pa.array(resolved), joined, texts), left & ~resolved
    # Unusual cells and rare prefixes, one by one.
    others = cells.filter(pa.array(left)).dictionary_encode(null_encoding="encode")
    encoded = [to_bytes(root.resolve(cell)) for cell in others.dictionary.to_pylist()]
    return pc.replace_with_mask(texts, pa.array(left), pa.array(encoded, pa.large_binary()).take(others.indices))


def to_bytes(image: str | Skipped) -> bytes:
    """A resolved cell as bytes. Refusals start with NUL, which no path holds."""
    if isinstance(image, Skipped):
        return _REFUSED + f"{image.reason.value}\0{image.message}".encode("utf-8", "surrogatepass")
    return image.encode("utf-8", "surrogatepass")


def from_bytes(text: bytes) -> str | Skipped:
    """The resolved cell that `to_bytes` encoded."""
    decoded = text.decode("utf-8", "surrogatepass")
    if not text.startswith(_REFUSED):
        return decoded
    reason, _, message = decoded[1:].partition("\0")
    return Skipped(Reason(reason), message)


def _frame(root: ImageRoot, prefix: str) -> tuple[bytes, bytes] | None:
    """What comes before and after the rest of cells that start with `prefix`; None if they are refused."""
    probe = ImageRoot(root.root).resolve(f"{prefix}x")
    if isinstance(probe, Skipped):
        return None
    query = root.root.query if probe.endswith(f"x{root.root.query}") else ""
    head = probe.removesuffix(query)
    return (to_bytes(head[:-1]), query.encode()) if head.endswith("x") else None


def _prefixes(cells: pa.Array) -> list[str]:
    """The prefixes of a sample of the cells."""
    sample = cells.take(pa.array(np.arange(0, len(cells), len(cells) // _SAMPLE + 1))).drop_null()
    return sorted({match.group() for match in map(_PREFIX.match, sample.to_pylist()) if match})


def _is_plain(values: pa.Array, prefix: str) -> np.ndarray:
    """Which of (N,) large_binary cells are `prefix` and a path to which no rule applies: (N,) bool.

    Such a path ends with a letter or digit. None of its parts is empty, `.` or `..`, or holds a colon, a question
    mark or NUL. Some other paths whose parts start with dots count as not plain.
    """
    borders, data = borders_and_bytes(values)
    starts, ends = borders[:-1] + len(prefix), borders[1:]
    plain = (starts < ends) & values.is_valid().to_numpy(zero_copy_only=False)
    if not plain.any():
        return plain
    if prefix:
        plain &= pc.starts_with(values, prefix).fill_null(False).to_numpy(zero_copy_only=False)
    head = data[np.minimum(starts, len(data) - 1)]
    plain &= _WORD[data[ends - 1]] & (head != ord("/")) & (head != ord("."))
    data, last = data[borders[0] : borders[-1]], borders[-1] - borders[0] - 1
    slashes = np.flatnonzero(data == ord("/"))
    second, third = (data[np.minimum(slashes + step, last)] for step in (1, 2))
    bad = [slashes[(second == ord("/")) | (second == ord(".")) & ((third == ord("/")) | (third == ord(".")))]]
    # Few manifests hold these bytes, and looking for them in `bytes` first is much faster.
    text = data.tobytes()
    bad += [np.flatnonzero(data == byte) for byte in b":?\0" if byte in text]
    positions = np.sort(np.concatenate(bad)) + borders[0]
    rows = np.searchsorted(borders, positions, "right") - 1
    plain[rows[positions >= starts[rows]]] = False
    return plain


def _join(frame: tuple[bytes, bytes], prefix: str, values: pa.Array) -> pa.Array:
    """(N,) large_binary cells that start with `prefix`, resolved; the results for other cells mean nothing."""
    before, after = frame
    texts = pc.binary_replace_slice(values, 0, len(prefix), before)
    if not after:
        return texts
    return pc.binary_join_element_wise(texts, *(pa.scalar(text, pa.large_binary()) for text in (after, b"")))


def _is_inside(root: ImageRoot, query: bytes, texts: pa.Array) -> np.ndarray:
    """Which resolved paths are not outside a fence: (N,) bool."""
    if not root.fenced:
        return np.ones(len(texts), np.bool_)
    if query.decode() != root.root.query:
        return np.zeros(len(texts), np.bool_)
    scheme = "" if root.root.is_local else f"{root.root.scheme}://"
    fence = to_bytes(scheme + root.root.path.rstrip("/") + "/")
    return pc.starts_with(texts, pattern=fence).fill_null(False).to_numpy(zero_copy_only=False)


def borders_and_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The borders of N large_binary texts, (N + 1,) int64, and the (M,) uint8 bytes between them, not copied."""
    _, borders, data = texts.buffers()
    if not len(texts) or data is None:
        return np.zeros(len(texts) + 1, np.int64), np.zeros(0, np.uint8)
    offsets = np.frombuffer(borders, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return offsets, np.frombuffer(data, np.uint8)
