"""Small pictures for a report: the face that was scored, cut by the box in the cache, else the whole picture."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.errors import ArtifactError, UsageError
from batchverify.faces.crops import box_face, fixed_face
from batchverify.faces.images import decode, read_image
from batchverify.fingerprint import DEFAULT_MARGIN, EmbeddingFingerprint
from batchverify.manifest.paths import ImageRoot
from batchverify.records import DecodedImage, Limits, Reason, Skipped
from batchverify.storage.location import Location

SIDE = 128
QUALITY = 82
# Files in memory at once.
BITE = 16
GONE = "the image is gone"
OUTSIDE = "outside --image-root"


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI, or None; note: what it shows, or why there is none."""

    uri: str | None
    note: str


@dataclass(frozen=True)
class ImageSource:
    """Where a run's pictures and boxes are: roots to try in turn, the cache's root and fingerprint."""

    roots: tuple[ImageRoot, ...]
    cache: str | None
    embedding: Mapping[str, Any]
    limits: Limits

    @classmethod
    def of(cls, record: Mapping[str, Any], image_root: str | None, cache: str | None) -> ImageSource:
        """From a run record; `image_root` and `cache` given by the user come first."""
        root = image_root or record.get("image_root")
        roots = [ImageRoot(Location.parse(root), fenced=True)] if root else _folders(record)
        options = record.get("options", {})
        limits = Limits(
            round(options.get("max_megabytes", 64.0) * 1e6), round(options.get("max_megapixels", 100.0) * 1e6)
        )
        return cls(tuple(roots), cache or record.get("cache"), record.get("embedding") or {}, limits)

    def resolve(self, cell: str | None) -> str | Skipped:
        """A manifest's cell as an absolute path: below the first root that has it, else below the first."""
        found = [root.resolve(cell) for root in self.roots]
        for each in found[:-1]:
            if isinstance(each, str) and Location.parse(each).kind() == "file":
                return each
        return next(iter(found[-1:]), Skipped(Reason.NOT_FOUND, "the run record names no image root"))

    def fences(self, cell: str | None) -> bool:
        """Whether a cell is refused only because it leads out of the root that the user named."""
        open_roots = [replace(root, fenced=False) for root in self.roots]
        refused = isinstance(self.resolve(cell), Skipped)
        return refused and any(isinstance(root.resolve(cell), str) for root in open_roots)


def _folders(record: Mapping[str, Any]) -> list[ImageRoot]:
    """The folders of the manifest's files, where relative paths start by default."""
    names = [name for name in record.get("manifest", []) if name != "the table"]
    return list(dict.fromkeys(ImageRoot(Location.parse(name).parent) for name in names))


def thumbnails(cells: Sequence[str | None], source: ImageSource) -> dict[str | None, Thumbnail]:
    """A thumbnail for each cell of an image column."""
    made: dict[str | None, Thumbnail] = {}
    for start in range(0, len(cells), BITE):
        made |= _some(cells[start : start + BITE], source)
    return made


def _some(cells: Sequence[str | None], source: ImageSource) -> dict[str | None, Thumbnail]:
    data: dict[str | None, bytes | Skipped] = {}
    for cell in cells:
        path = source.resolve(cell)
        data[cell] = path if isinstance(path, Skipped) else read_image(path, source.limits)
    made = _made(data, source)
    return made | {cell: Thumbnail(None, OUTSIDE) for cell in data if source.fences(cell)}


def _made(data: Mapping[str | None, bytes | Skipped], source: ImageSource) -> dict[str | None, Thumbnail]:
    keys = {cell: hashlib.sha256(each).digest() for cell, each in data.items() if isinstance(each, bytes)}
    entries = _entries(list(keys.values()), source)
    return {cell: _thumbnail(each, entries.get(keys.get(cell, b"")), source) for cell, each in data.items()}


def _entries(keys: Sequence[bytes], source: ImageSource) -> dict[bytes, Entry]:
    """What the cache holds of these images; nothing where there is no cache."""
    if not source.cache or not source.embedding or not keys:
        return {}
    try:
        cache = EmbeddingCache(source.cache, EmbeddingFingerprint(source.embedding))
        found = cache.get_many(keys)
    except (ArtifactError, UsageError):
        return {}
    return {entry.key: entry for entry in found if entry is not None}


def _thumbnail(data: bytes | Skipped, entry: Entry | None, source: ImageSource) -> Thumbnail:
    if isinstance(data, Skipped):
        note = GONE if data.reason == Reason.NOT_FOUND else f"{data.reason.value}: not shown"
        return Thumbnail(None, note)
    picture = decode(data, source.limits, _working_side(source))
    if isinstance(picture, Skipped):
        return Thumbnail(None, f"{picture.reason.value}: not shown")
    face = _face(picture, entry, source.embedding.get("crop", {}))
    pixels, note = (picture.pixels, "whole picture") if face is None else (face, "face")
    return Thumbnail(_data_uri(pixels), note)


def _working_side(source: ImageSource) -> int:
    side = source.embedding.get("crop", {}).get("working_side", 1024)
    return side if isinstance(side, int) else 1024


def _face(picture: DecodedImage, entry: Entry | None, crop: Mapping[str, Any]) -> np.ndarray | None:
    """The (160, 160, 3) uint8 RGB that the backbone saw; None where it is not known."""
    mode = crop.get("mode")
    if mode in ("center", "none"):
        return fixed_face(picture.pixels, mode).pixels
    if entry is None or entry.vector is None or mode != "detect":
        return None
    x0, y0, x1, y1 = (float(each) / picture.scale for each in entry.box)
    margin = int(crop.get("margin", DEFAULT_MARGIN))
    face = box_face(picture.pixels, (x0, y0, x1, y1), margin, entry.confidence, entry.faces)
    return None if face is None else face.pixels


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
