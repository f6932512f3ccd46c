"""The cache keys of images, a hash of their bytes, so that an image has to be there to be found."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from batchverify.errors import UsageError
from batchverify.faces.images import read_image
from batchverify.manifest.manifest import Columns, Manifest
from batchverify.manifest.paths import ImageRoot
from batchverify.records import Limits, Skipped
from batchverify.storage.location import Location

# Images that are read side by side, and how many before their bytes are dropped.
READERS = 16
READ_BATCH = 256
# An image of any size may be in the cache, as `too_large`.
_ANY_SIZE = Limits(bytes=1 << 62)
# The first bytes of formats (TIFF, BMP, JPEG 2000, PNM) that an earlier release decoded wrongly where depths or
# meanings were odd. They have keys of their own, since a cache may still hold vectors of those pixels.
_REVISED = re.compile(rb"II[*+]\0|MM\0[*+]|BM|\xff\x4f\xff\x51|\0\0\0\x0cjP|P[1-7]\s")
_REVISION = b"reader 2:"
_HEX = re.compile(r"[0-9a-fA-F]{64}")


def content_key(data: bytes) -> bytes:
    """The key of an image with these encoded bytes: their SHA-256, for some formats the `revised_key` of that."""
    digest = hashlib.sha256(data).digest()
    return revised_key(digest) if _REVISED.match(data) else digest


def revised_key(digest: bytes) -> bytes:
    """The key of an image of a format that is read otherwise now, whose bytes have this SHA-256."""
    return hashlib.sha256(_REVISION + digest).digest()


def parse_key(text: str) -> bytes:
    """A SHA-256 in hex, as `sha256sum` prints it. Raises `UsageError` for another text."""
    if not _HEX.fullmatch(text):
        raise UsageError(f"{text}: not a key: 64 hexadecimal digits, as `sha256sum IMAGE` prints them")
    return bytes.fromhex(text)


def possible_keys(digest: bytes) -> tuple[bytes, bytes]:
    """The keys under which a cache may hold an image whose bytes have this SHA-256, of whatever format it is."""
    return digest, revised_key(digest)


@dataclass
class ImageKeys:
    """Images by absolute path or URI, each with the SHA-256 of its bytes.

    unread: why others have none: they cannot be read now.
    """

    digests: dict[str, bytes] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def add(self, images: Iterable[str | Skipped]) -> None:
        """Read more images. A refused one counts as not read."""
        paths = []
        for image in images:
            if isinstance(image, Skipped):
                self.unread[image.message] = image.reason.value
            else:
                paths.append(image)
        with ThreadPoolExecutor(READERS, "read") as pool:
            for start in range(0, len(paths), READ_BATCH):
                batch = paths[start : start + READ_BATCH]
                for path, key in zip(batch, pool.map(_key_of, batch), strict=True):
                    if isinstance(key, Skipped):
                        self.unread[path] = key.message
                    else:
                        self.digests[path] = key


def _key_of(path: str) -> bytes | Skipped:
    data = read_image(path, _ANY_SIZE)
    return data if isinstance(data, Skipped) else hashlib.sha256(data).digest()


def keys_of(
    images: Sequence[str],
    manifest: Any = None,
    *,
    columns: Columns | None = None,
    image_root: str | None = None,
) -> ImageKeys:
    """The keys of named images and of those of a manifest.

    image_root: where relative paths start; by default the current folder, for a manifest its own. Raises
    `ManifestError` for a manifest that cannot be read.
    """
    found = ImageKeys()
    root = ImageRoot(Location.parse(image_root or "."))
    found.add(root.resolve(image) for image in images)
    if manifest is not None:
        found.add(Manifest.open(manifest, columns=columns, image_root=image_root).scan().images)
    return found
