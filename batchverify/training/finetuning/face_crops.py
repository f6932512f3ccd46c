"""The faces of a manifest's images, cut out once and kept on disk while a backbone learns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.embedding.embedder import Embedder
from batchverify.engine.stages import LoadedChunk, LoadedImage, Loader, LoadPlan
from batchverify.faces.crops import Face
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.records import Limits, Reason, Skipped
from batchverify.storage.background import prefetch
from batchverify.training.finetuning.stored_blocks import StoredBlocks

# Images of a block.
BLOCK = 64
# Bytes of decoded images. Two chunks are in memory: one is loaded while faces are searched for in the other.
PIXEL_BUDGET = 128 << 20
# Parts of an embedding's document that change a face: not those of the network that takes it.
_OF_CROPS = ("crop", "size", "pipeline")

# done, all: how much is there and how much there will be.
Report = Callable[[int, int], None]
Chunk = tuple[LoadedChunk, list[LoadedImage]]


@dataclass
class _Block:
    """Faces of consecutive images: (N, S, S, 3) uint8, keys, and failures by position."""

    pixels: np.ndarray
    keys: list[bytes] = field(default_factory=list)
    failed: dict[int, Skipped] = field(default_factory=dict)


class FaceCrops:
    """One face of each of M images, in their order.

    pixels: (M, S, S, 3) uint8 RGB, mapped from disk, black for a failed image. keys: content keys, empty for images
    that could not be read. failed: why an image has no face, by its number. origin: a text that changes whenever the
    faces do.
    """

    def __init__(self, blocks: StoredBlocks, document: dict[str, Any]) -> None:
        self._blocks = blocks
        self.keys: list[bytes] = []
        self.failed: dict[int, Skipped] = {}
        for block in sorted(blocks.notes):
            note, start = blocks.notes[block], blocks.span(block).start
            self.keys += map(bytes.fromhex, note["keys"])
            for row, (reason, message, depends) in note["failed"].items():
                self.failed[start + int(row)] = Skipped(Reason(reason), message, depends)
        parts = [repr(document), *(key.hex() for key in self.keys), *map(str, sorted(self.failed))]
        self.origin = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def pixels(self) -> np.ndarray:
        """See the class."""
        return self._blocks.array

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def collect(
        cls,
        image_paths: Sequence[str | Skipped],
        embedder: Embedder,
        limits: Limits,
        fence: str | None,
        folder: Path,
        progress: Report = lambda *_: None,
        *,
        block: int = BLOCK,
        pixel_budget: int = PIXEL_BUDGET,
    ) -> FaceCrops:
        """Cut the faces out, or take those that `folder` holds already, of these paths under these settings.

        image_paths: absolute paths and URIs; refused ones fail. embedder: finds the faces. fence, pixel_budget: see
        `LoadPlan`. block: images whose faces are written at a time; a kill loses at most so many.
        An image that has changed since its face was cut out is not read again. Raises `BatchverifyError` if the disk
        fails or has too little space.
        """
        document = _document(image_paths, embedder.fingerprint, limits)
        size = embedder.fingerprint.size
        blocks = StoredBlocks(folder, document, (len(image_paths), size, size, 3), np.uint8, block)
        missing = blocks.missing
        plan = LoadPlan(embedder.settings, embedder.fingerprint, limits, fence=fence, pixel_budget=pixel_budget)
        spans = [[image_paths[image] for image in blocks.span(number)] for number in missing]
        done = len(image_paths) - sum(map(len, spans))
        progress(done, len(image_paths))
        chunks = prefetch(_chunks(Loader(plan, None), spans), ahead=1)
        for number, paths in zip(missing, spans, strict=True):
            cut = _cut(paths, chunks, embedder)
            failed = {row: (each.reason.value, each.message, each.depends) for row, each in cut.failed.items()}
            blocks.write(number, cut.pixels, keys=[key.hex() for key in cut.keys], failed=failed)
            done += len(paths)
            progress(done, len(image_paths))
        return cls(blocks, document)


def _document(
    image_paths: Sequence[str | Skipped], fingerprint: EmbeddingFingerprint, limits: Limits
) -> dict[str, Any]:
    """What crops depend on, beside the bytes of the images."""
    names = [path if isinstance(path, str) else f"\0{path.message}" for path in image_paths]
    return {
        **{name: fingerprint.document[name] for name in _OF_CROPS},
        "limits": [limits.bytes, limits.pixels],
        "images": hashlib.sha256("\n".join(names).encode("utf8", "surrogateescape")).hexdigest(),
    }


def _chunks(loader: Loader, spans: Sequence[Sequence[str | Skipped]]) -> Iterator[Chunk]:
    """The readable images of each block, loaded in as many chunks as memory allows."""
    for span in spans:
        paths = [path for path in span if isinstance(path, str)]
        while paths:
            loaded, images = loader(paths)
            yield loaded, images
            paths = paths[len(loaded.keys) :]


def _cut(paths: Sequence[str | Skipped], chunks: Iterator[Chunk], embedder: Embedder) -> _Block:
    """The faces of a block's images."""
    size = embedder.fingerprint.size
    block = _Block(np.zeros((len(paths), size, size, 3), np.uint8), [b""] * len(paths))
    block.failed = {row: path for row, path in enumerate(paths) if isinstance(path, Skipped)}
    rows = [row for row in range(len(paths)) if row not in block.failed]
    while rows:
        loaded, images = next(chunks)
        _add(block, rows[: len(loaded.keys)], loaded, _faces(embedder, images))
        rows = rows[len(loaded.keys) :]
    return block


def _faces(embedder: Embedder, images: Sequence[LoadedImage]) -> list[Face | Skipped]:
    """The faces of loaded images; fixed crops were taken when the images were loaded."""
    if not embedder.settings.detects:
        return [image for image in images if isinstance(image, Face)]
    return embedder.find_faces([image.pixels for image in images])


def _add(block: _Block, rows: Sequence[int], loaded: LoadedChunk, faces: Sequence[Face | Skipped]) -> None:
    """Add a chunk's results to a block. rows: of the chunk's images."""
    results = {**loaded.skipped, **dict(zip(loaded.missing, faces, strict=True))}
    for position, (row, key) in enumerate(zip(rows, loaded.keys, strict=True)):
        # An image with the bytes of an earlier one of its chunk has that one's face.
        result = results.get(position) or results[loaded.keys.index(key)]
        block.keys[row] = key or b""
        if isinstance(result, Skipped):
            block.failed[row] = result
        else:
            block.pixels[row] = result.pixels
