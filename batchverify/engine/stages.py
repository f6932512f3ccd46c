"""What happens to one chunk of images or pairs: the stages, the same under every engine."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache, KeyIndex
from batchverify.cache.segment import Entry
from batchverify.faces.crops import Face, augmented, fixed_face
from batchverify.faces.images import decode, decoder_set, read_image, too_large_dependence
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.process import peak_memory
from batchverify.progress import Stopwatch
from batchverify.records import DecodedImage, Limits, Reason, Skipped
from batchverify.storage.location import scheme_of

if TYPE_CHECKING:
    from batchverify.embedding.embedder import Embedder
    from batchverify.heads.head import Head

# A chunk of large pictures is cut short once this many bytes of pixels are in memory.
PIXEL_BUDGET = 256 << 20
# Files read before the next are decoded: bounds the encoded bytes in memory, and nothing is read twice.
BITE = 16
# From object stores they are read side by side: nearly as many as pyarrow has connections for.
READERS = 24
AHEAD = 2 * BITE
# A chunk is cut short, too, where a store takes so long over it: others see that the run goes on.
PATIENT_SECONDS = 45.0

Image = DecodedImage | Face


@dataclass(frozen=True)
class LoadPlan:
    """What loading needs to know. cache: its root, or None without one."""

    settings: EmbeddingSettings
    fingerprint: EmbeddingFingerprint
    limits: Limits = field(default_factory=Limits)
    cache: str | None = None
    retry_failed: bool = False


@dataclass
class Loaded:
    """What became of the first `len(keys)` images of a chunk; the rest is to be asked for again.

    keys: content hashes, None where the bytes could not be had. found: cache entries (vector or failure).
    skipped: fresh failures. missing: positions whose images go to the embedder. A position in none of the
    three has the key of an earlier one. seconds: by stage (read, look up, decode). peak_memory: the worker's
    so far, in MB.
    """

    keys: list[bytes | None] = field(default_factory=list)
    found: dict[int, Entry] = field(default_factory=dict)
    skipped: dict[int, Skipped] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: float = 0.0


@dataclass(frozen=True)
class Embeddings:
    """Entries of some images, in order. seconds: by stage (start: building the embedder, detect, embed).

    peak_memory: the worker's, in MB.
    """

    entries: list[Entry]
    seconds: dict[str, float]
    peak_memory: float = 0.0


@dataclass(frozen=True)
class PairScores:
    """Of N pairs: (N,) float32 probability and similarity. seconds: by stage (score). peak_memory: as above."""

    probability: np.ndarray
    similarity: np.ndarray
    seconds: dict[str, float]
    peak_memory: float = 0.0


class Loader:
    """References in; cache entries, reasons and decoded images out. Build once, call many."""

    def __init__(self, plan: LoadPlan, index: KeyIndex | None) -> None:
        self.plan = plan
        self._cache = (
            EmbeddingCache(plan.cache, plan.fingerprint, index=index) if plan.cache is not None else None
        )
        self._valid = {
            Reason.UNDECODABLE: decoder_set(),
            Reason.TOO_LARGE: too_large_dependence(plan.limits),
            Reason.NO_FACE: "",
        }

    def __call__(self, image_paths: Sequence[str]) -> tuple[Loaded, list[Image]]:
        """Read, hash, look up and, where needed, decode; the images are those of `Loaded.missing`, in order."""
        watch, started = Stopwatch(), time.monotonic()
        loaded = Loaded(seconds=watch.seconds)
        images: list[Image] = []
        with closing(self._bites(image_paths, watch, lambda: _room(loaded, images))) as bites:
            for data in bites:
                images += self._bite(loaded, data, watch)
                if not _room(loaded, images) or time.monotonic() - started > PATIENT_SECONDS:
                    break
        loaded.peak_memory = peak_memory()
        return loaded, images

    def _bites(
        self, image_paths: Sequence[str], watch: Stopwatch, room: Callable[[], int]
    ) -> Generator[list[bytes | Skipped], None, None]:
        """The bytes of the images in order, some at a time; room: how many more are wanted, by all one knows.

        From object stores they come side by side, and while some are decoded the next are on their way.
        """
        if not any(map(scheme_of, image_paths)):
            for start in range(0, len(image_paths), BITE):
                with watch.stage("read"):
                    data = [read_image(each, self.plan.limits) for each in image_paths[start : start + BITE]]
                yield data
            return
        pool = ThreadPoolExecutor(READERS, "read")
        waiting, ahead = deque(image_paths), deque[Future[bytes | Skipped]]()
        try:
            while waiting or ahead:
                while waiting and len(ahead) < max(BITE, min(AHEAD, room())):
                    ahead.append(pool.submit(read_image, waiting.popleft(), self.plan.limits))
                with watch.stage("read"):
                    data = [ahead.popleft().result() for _ in range(min(BITE, len(ahead)))]
                yield data
        finally:
            pool.shutdown(cancel_futures=True)

    def _bite(self, loaded: Loaded, data: Sequence[bytes | Skipped], watch: Stopwatch) -> list[Image]:
        """Settle a few more images of a chunk in `loaded`; returns those that go to the embedder."""
        with watch.stage("read"):
            keys = [None if isinstance(each, Skipped) else self.key(each) for each in data]
        with watch.stage("look up"):
            entries = self._look_up([key for key in keys if key is not None])
        images: list[Image] = []
        for each, key in zip(data, keys, strict=True):
            position, repeated = len(loaded.keys), key is not None and key in loaded.keys
            loaded.keys.append(key)
            if key in entries:
                loaded.found[position] = entries[key]
            elif not repeated:
                with watch.stage("decode"):
                    image = each if isinstance(each, Skipped) else self._image(each)
                if isinstance(image, Skipped):
                    loaded.skipped[position] = image
                else:
                    loaded.missing.append(position)
                    images.append(image)
        return images

    @staticmethod
    def key(data: bytes) -> bytes:
        """The cache key of an image: SHA-256 of its encoded bytes."""
        return hashlib.sha256(data).digest()

    def _look_up(self, keys: list[bytes]) -> dict[bytes | None, Entry]:
        if self._cache is None:
            return {}
        found = zip(keys, self._cache.get_many(keys), strict=True)
        return {key: entry for key, entry in found if entry is not None and self._holds(entry)}

    def _holds(self, entry: Entry) -> bool:
        """Whether an entry counts: a failure only under the limit or decoders it depended on."""
        if entry.skipped is None:
            return True
        return not self.plan.retry_failed and self._valid.get(entry.skipped.reason) == entry.skipped.depends

    def _image(self, data: bytes) -> Image | Skipped:
        picture = decode(data, self.plan.limits, self.plan.settings.working_side)
        if isinstance(picture, Skipped) or self.plan.settings.crop == "detect":
            return picture
        # Without a detector the face is cut here, so that no more than it travels to the embedder.
        return fixed_face(picture.pixels, self.plan.settings.crop).scaled(picture.scale)


def score_indices(head: Head, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> PairScores:
    """Gather and score pairs of (N,) indices into (M, 512) float16 vectors."""
    watch = Stopwatch()
    with watch.stage("score"):
        probability, similarity = head.score_pairs(vectors, a, b)
    return PairScores(probability, similarity, watch.seconds, peak_memory())


def _room(loaded: Loaded, images: Sequence[Image]) -> int:
    """How many more images of a chunk the memory for pixels will take, if they are as large as those so far."""
    if not images:
        return AHEAD
    taken = sum(image.pixels.nbytes for image in images)
    return max(0, -(-(PIXEL_BUDGET - taken) * len(loaded.keys) // taken))


def embed_images(
    embedder: Embedder, images: Sequence[Image], keys: Sequence[bytes], view: int = 0
) -> Embeddings:
    """Detect, crop and embed: one entry an image, its vector rounded as the cache rounds it.

    view: the number of an augmented view of the cropped face, 0 for the face as it is.
    """
    pictures = [image for image in images if isinstance(image, DecodedImage)]
    watch = Stopwatch(embedder.start_seconds())
    with watch.stage("detect"):
        found = iter(embedder.find_faces([picture.pixels for picture in pictures]))
    faces: list[Face | Skipped] = []
    for image in images:
        if isinstance(image, Face):
            faces.append(image)
            continue
        face = next(found)
        faces.append(face.scaled(image.scale) if isinstance(face, Face) else face)
    if view:
        faces = [
            replace(face, pixels=augmented(face.pixels, key, view)) if isinstance(face, Face) else face
            for face, key in zip(faces, keys, strict=True)
        ]
    with watch.stage("embed"):
        embedded = embedder.embed_faces(faces)
    vectors = embedded.vectors.astype(np.float16)
    entries = [
        Entry(key, None, skipped=skipped)
        if skipped is not None
        else Entry(
            key,
            vectors[row],
            tuple(embedded.boxes[row].tolist()),
            float(embedded.confidence[row]),
            int(embedded.faces[row]),
        )
        for row, (key, skipped) in enumerate(zip(keys, embedded.skipped, strict=True))
    ]
    return Embeddings(entries, watch.seconds, peak_memory())
