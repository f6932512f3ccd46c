"""Small images for a report: the face that was scored, cut by the box in the cache, else the whole image."""

from __future__ import annotations

import base64
import errno
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.image_keys import content_key
from batchverify.cache.segment import Entry
from batchverify.errors import ArtifactError, UsageError
from batchverify.faces.crops import box_pixels, fixed_face
from batchverify.faces.images import decode, read_image
from batchverify.fingerprint import DEFAULT_MARGIN, MOST_MARGIN, EmbeddingFingerprint
from batchverify.manifest.paths import ImageRoot
from batchverify.records import DecodedImage, Limits, Reason, Skipped
from batchverify.storage.fence import Fence
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_own_account

SIDE = 128
QUALITY = 82
# Files in memory at once.
BITE = 16
# The longer side of a decoded image, for records that do not state it.
WORKING_SIDE = 1024
MISSING = "image not found"
OUTSIDE = "outside --image-root"


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data URI, or None. note: what it shows, or why there is none."""

    uri: str | None
    note: str


@dataclass(frozen=True)
class ImageSource:
    """Where a run's images and boxes are: roots to try in turn, the cache's root and fingerprint."""

    roots: tuple[ImageRoot, ...]
    cache: str | None
    embedding: Mapping[str, Any]
    limits: Limits

    @classmethod
    def of(
        cls,
        record: Mapping[str, Any],
        image_root: str | None,
        cache: str | None,
        *,
        follow_symlinks: bool = False,
    ) -> ImageSource:
        """From a run record; the user's `image_root` and `cache` take precedence.

        A record may be another person's: its URIs choose no server, and its limits are no larger than ours.
        """
        root = Location.parse(image_root) if image_root else _stated(record.get("image_root"))
        if root is not None:
            roots = [ImageRoot(root, fenced=True, follow_symlinks=follow_symlinks)]
        else:
            roots = [] if record.get("image_root") else _folders(record)
        stored = Location.parse(cache) if cache else _stated(record.get("cache"))
        # Of several backbones the faces that one of them saw are shown.
        embedding = EmbeddingFingerprint(record.get("embedding") or {}).members[0].document
        return cls(tuple(roots), str(stored) if stored else None, embedding, _limits(record.get("options")))

    def resolve(self, cell: str | None) -> str | Skipped:
        """A manifest's cell as an absolute path: below the first root that has it, else below the last."""
        path: str | Skipped = Skipped(Reason.NOT_FOUND, "the run record names no image root")
        for root in self.roots:
            path = root.resolve(cell)
            if root != self.roots[-1] and isinstance(path, str) and _is_file(path):
                break
        return path

    @cached_property
    def _fence(self) -> Fence | None:
        folder = self.roots[0].fence if self.roots else None
        return Fence(folder) if folder is not None else None

    def read(self, cell: str | None) -> bytes | Skipped:
        """The bytes of a cell's image, or why they cannot be read."""
        path = self.resolve(cell)
        return path if isinstance(path, Skipped) else read_image(path, self.limits, self._fence)

    def fences(self, cell: str | None) -> bool:
        """Whether a cell is refused only because it leads out of the user's root."""
        open_roots = [replace(root, fenced=False) for root in self.roots]
        refused = isinstance(self.resolve(cell), Skipped)
        return refused and any(isinstance(root.resolve(cell), str) for root in open_roots)


def _is_file(path: str) -> bool:
    """Whether a file is there, or might be: another one in its place would be another picture."""
    try:
        return Location.parse(path).kind() == "file"
    except OSError as exc:
        return exc.errno != errno.ENAMETOOLONG  # no file can have this name
    except (ValueError, pa.ArrowException, UsageError):
        return False


def _stated(value: Any) -> Location | None:
    """A path or URI of a run record; None if there is none, or if it names a server or an account."""
    try:
        location = Location.parse(value) if isinstance(value, str) and value else None
    except UsageError:
        return None
    return location if location is None or not location.query or is_own_account(location.query) else None


def _limits(options: Any) -> Limits:
    """The limits of a run, at most those of `Limits`."""
    stated, most = options if isinstance(options, Mapping) else {}, Limits()

    def least(name: str, limit: int) -> int:
        value = stated.get(name)
        return round(value * 1e6) if isinstance(value, int | float) and 0 < value < limit / 1e6 else limit

    return Limits(least("max_megabytes", most.bytes), least("max_megapixels", most.pixels))


def _folders(record: Mapping[str, Any]) -> list[ImageRoot]:
    """The folders of the manifest's files, where relative paths start by default."""
    names = record.get("manifest")
    named = [_stated(name) for name in names if name != "the table"] if isinstance(names, list) else []
    return list(dict.fromkeys(ImageRoot(each.parent) for each in named if each is not None))


def thumbnails(cells: Sequence[str | None], source: ImageSource) -> dict[str | None, Thumbnail]:
    """A thumbnail for each cell of an image column."""
    by_cell: dict[str | None, Thumbnail] = {}
    for start in range(0, len(cells), BITE):
        by_cell |= _batch(cells[start : start + BITE], source)
    return by_cell


def _batch(cells: Sequence[str | None], source: ImageSource) -> dict[str | None, Thumbnail]:
    files = {cell: source.read(cell) for cell in cells}
    keys = {cell: content_key(data) for cell, data in files.items() if isinstance(data, bytes)}
    entries = cached_entries(list(keys.values()), source)
    return {
        cell: Thumbnail(None, OUTSIDE)
        if source.fences(cell)
        else _thumbnail(data, entries.get(keys.get(cell, b"")), source)
        for cell, data in files.items()
    }


def cached_entries(keys: Sequence[bytes], source: ImageSource) -> dict[bytes, Entry]:
    """The cache's entries of these images; none without a readable cache."""
    if not source.cache or not source.embedding or not keys:
        return {}
    try:
        cache = EmbeddingCache(source.cache, EmbeddingFingerprint(source.embedding))
        entries = cache.get_many(keys)
    except (ArtifactError, UsageError):
        return {}
    return {entry.key: entry for entry in entries if entry is not None}


def _thumbnail(data: bytes | Skipped, entry: Entry | None, source: ImageSource) -> Thumbnail:
    crop = source.embedding.get("crop")
    crop = crop if isinstance(crop, Mapping) else {}
    side = crop.get("working_side")
    side = side if isinstance(side, int) else WORKING_SIDE
    decoded = data if isinstance(data, Skipped) else decode(data, source.limits, side)
    if isinstance(decoded, Skipped):
        missing = decoded.reason == Reason.NOT_FOUND
        return Thumbnail(None, MISSING if missing else f"{decoded.reason.value}: not shown")
    face = _face(decoded, entry, crop)
    pixels, note = (decoded.pixels, "whole image") if face is None else (face, "face")
    return Thumbnail(_data_uri(pixels), note)


def _face(image: DecodedImage, entry: Entry | None, crop: Mapping[str, Any]) -> np.ndarray | None:
    """The square uint8 RGB crop that the backbone saw, 160 pixels wide; None if it is not known.

    Of an aligned face the box with a margin: the cache holds no landmarks.
    """
    mode = crop.get("mode")
    if mode in ("center", "none"):
        return fixed_face(image.pixels, mode).pixels
    if entry is None or entry.vector is None or mode not in ("detect", "align"):
        return None
    x0, y0, x1, y1 = (float(edge) / image.scale for edge in entry.box)
    margin = crop.get("margin")
    margin = margin if isinstance(margin, int) and 0 <= margin <= MOST_MARGIN else DEFAULT_MARGIN
    return box_pixels(image.pixels, (x0, y0, x1, y1), margin)


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
