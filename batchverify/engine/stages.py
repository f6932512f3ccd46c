"""The stages, which are the same under every engine: load and embed a chunk of images, score a block of pairs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache, KeyIndex
from batchverify.cache.image_keys import content_key
from batchverify.cache.segment import Entry
from batchverify.faces.crops import Face, augmented, fixed_face
from batchverify.faces.images import decode, decoder_set, read_image, too_large_dependence
from batchverify.faces.quality import sharpness
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.process import peak_memory
from batchverify.progress import Stopwatch
from batchverify.records import DecodedImage, Limits, Reason, Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.storage.fence import Fence
from batchverify.storage.location import scheme_of

if TYPE_CHECKING:
    from batchverify.embedding.embedder import Embedder

# A chunk is cut short once its decoded images take this many bytes.
PIXEL_BUDGET = 256 << 20
# A chunk is also cut short if loading takes this long, so that a slow store does not look like a hang.
LOAD_SECONDS = 45.0
# Files that are read before any of them is decoded: this bounds the encoded bytes in memory.
READ_BATCH = 16
# Threads that read from object stores, almost as many as pyarrow has connections, and files they may read ahead.
READERS = 24
READ_AHEAD = 2 * READ_BATCH
LoadedImage = DecodedImage | Face


@dataclass(frozen=True)
class LoadPlan:
    """The settings of loading.

    cache: its root, or None. fence: the folder that local images must lie in, or None. pixel_budget: see
    `PIXEL_BUDGET`. details: vectors in the cache count only if the details of their faces are known.
    """

    settings: EmbeddingSettings
    fingerprint: EmbeddingFingerprint
    limits: Limits = field(default_factory=Limits)
    cache: str | None = None
    retry_failed: bool = False
    fence: str | None = None
    pixel_budget: int = PIXEL_BUDGET
    details: bool = False


@dataclass
class LoadedChunk:
    """The results for the first `len(keys)` images of a chunk; the others must be loaded again.

    keys: content hashes, None for images that could not be read. cached: cache entries (vector or failure) by
    position. skipped: new failures by position. missing: positions of the images that go to the embedder. A
    position in none of the three has the key of an earlier one. seconds: by stage (read, look up, decode).
    peak_memory: of the worker so far, in MB.
    """

    keys: list[bytes | None] = field(default_factory=list)
    cached: dict[int, Entry] = field(default_factory=dict)
    skipped: dict[int, Skipped] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: float = 0.0


@dataclass(frozen=True)
class EmbeddedChunk:
    """One entry for each image, in order, and what computed the vectors.

    seconds: by stage (start: building the embedder, detect, embed). peak_memory: of the worker so far, in MB.
    """

    entries: list[Entry]
    compute_path: ComputePath
    seconds: dict[str, float]
    peak_memory: float = 0.0


@dataclass(frozen=True)
class PairScores:
    """(N,) float32 probability and similarity of N pairs. seconds: by stage (score). peak_memory: as above."""

    probability: np.ndarray
    similarity: np.ndarray
    seconds: dict[str, float]
    peak_memory: float = 0.0


class Loader:
    """Loads chunks of images: looks them up in the cache, decodes those that are missing. Build once, call often."""

    def __init__(self, plan: LoadPlan, index: KeyIndex | None) -> None:
        self.plan = plan
        self._fence = Fence(plan.fence) if plan.fence is not None else None
        self._cache = (
            EmbeddingCache(plan.cache, plan.fingerprint, index=index, details=plan.details)
            if plan.cache is not None
            else None
        )
        self._valid = {
            Reason.UNDECODABLE: decoder_set(),
            Reason.TOO_LARGE: too_large_dependence(plan.limits),
            Reason.NO_FACE: "",
        }

    def __call__(self, image_paths: Sequence[str]) -> tuple[LoadedChunk, list[LoadedImage]]:
        """Read, hash, look up and, if needed, decode. Returns the images of `LoadedChunk.missing`, in order, too."""
        watch, started = Stopwatch(), time.monotonic()
        loaded = LoadedChunk(seconds=watch.seconds)
        images: list[LoadedImage] = []
        with closing(self._read(image_paths, watch, lambda: self._room(loaded, images))) as batches:
            for batch in batches:
                images += self._add(loaded, batch, watch)
                if not self._room(loaded, images) or time.monotonic() - started > LOAD_SECONDS:
                    break
        loaded.peak_memory = peak_memory()
        return loaded, images

    def _read(
        self, image_paths: Sequence[str], watch: Stopwatch, room: Callable[[], int]
    ) -> Generator[list[bytes | Skipped], None, None]:
        """The bytes of the images in order, in batches. room: how many more images fit into memory.

        Object stores are read in parallel, and ahead while earlier images are decoded.
        """
        if not any(map(scheme_of, image_paths)):
            for start in range(0, len(image_paths), READ_BATCH):
                with watch.stage("read"):
                    paths = image_paths[start : start + READ_BATCH]
                    batch = [read_image(path, self.plan.limits, self._fence) for path in paths]
                yield batch
            return
        pool = ThreadPoolExecutor(READERS, "read")
        waiting, ahead = deque(image_paths), deque[Future[bytes | Skipped]]()
        try:
            while waiting or ahead:
                while waiting and len(ahead) < max(READ_BATCH, min(READ_AHEAD, room())):
                    ahead.append(pool.submit(read_image, waiting.popleft(), self.plan.limits, self._fence))
                with watch.stage("read"):
                    batch = [ahead.popleft().result() for _ in range(min(READ_BATCH, len(ahead)))]
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _add(self, loaded: LoadedChunk, batch: Sequence[bytes | Skipped], watch: Stopwatch) -> list[LoadedImage]:
        """Add the results for a batch to `loaded`; returns the images that go to the embedder."""
        with watch.stage("read"):
            keys = [None if isinstance(data, Skipped) else content_key(data) for data in batch]
        with watch.stage("look up"):
            entries = self._look_up([key for key in keys if key is not None])
        images: list[LoadedImage] = []
        for data, key in zip(batch, keys, strict=True):
            position, repeated = len(loaded.keys), key is not None and key in loaded.keys
            loaded.keys.append(key)
            if key in entries:
                loaded.cached[position] = entries[key]
            elif not repeated:
                with watch.stage("decode"):
                    image = data if isinstance(data, Skipped) else self._decode(data)
                if isinstance(image, Skipped):
                    loaded.skipped[position] = image
                else:
                    loaded.missing.append(position)
                    images.append(image)
        return images

    def _look_up(self, keys: list[bytes]) -> dict[bytes | None, Entry]:
        if self._cache is None:
            return {}
        entries = zip(keys, self._cache.get_many(keys), strict=True)
        return {key: entry for key, entry in entries if entry is not None and self._is_valid(entry)}

    def _is_valid(self, entry: Entry) -> bool:
        """Whether an entry may be used: a failure only under the limit or decoders that it depends on."""
        if entry.skipped is None:
            return True
        return not self.plan.retry_failed and self._valid.get(entry.skipped.reason) == entry.skipped.depends

    def _decode(self, data: bytes) -> LoadedImage | Skipped:
        image = decode(data, self.plan.limits, self.plan.settings.working_side)
        if isinstance(image, Skipped) or self.plan.settings.detects:
            return image
        # A fixed crop is taken here, so that only the face travels to the embedder.
        return fixed_face(image.pixels, self.plan.settings.crop, self.plan.fingerprint.size).scaled(image.scale)

    def _room(self, loaded: LoadedChunk, images: Sequence[LoadedImage]) -> int:
        """How many more images of a chunk fit into the pixel budget if they are as large as those so far."""
        if not images:
            return READ_AHEAD
        taken = sum(image.pixels.nbytes for image in images)
        return max(0, -(-(self.plan.pixel_budget - taken) * len(loaded.keys) // taken))


def embed_images(
    embedder: Embedder, images: Sequence[LoadedImage], keys: Sequence[bytes], view: int = 0
) -> EmbeddedChunk:
    """Detect, crop and embed: one entry per image, with its vector rounded as in the cache.

    view: the number of an augmented view of the cropped face, 0 for the face itself.
    """
    decoded = [image.pixels for image in images if isinstance(image, DecodedImage)]
    watch = Stopwatch(embedder.start_seconds())
    with watch.stage("detect"):
        detected = iter(embedder.find_faces(decoded))
    faces: list[Face | Skipped] = []
    for image in images:
        if isinstance(image, Face):
            faces.append(image)
            continue
        face = next(detected)
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
        Entry(
            key,
            vectors[row],
            tuple(embedded.boxes[row].tolist()),
            float(embedded.confidence[row]),
            int(embedded.faces[row]),
            **_details(face),
        )
        if isinstance(face, Face)
        else Entry(key, None, skipped=face)
        for row, (key, face) in enumerate(zip(keys, faces, strict=True))
    ]
    return EmbeddedChunk(entries, embedder.compute_path, watch.seconds, peak_memory())


def _details(face: Face) -> dict[str, Any]:
    """What an entry also says of a face."""
    details: dict[str, Any] = {"rotation": face.rotation, "sharpness": sharpness(face.pixels)}
    if face.landmarks is not None:
        details["landmarks"] = face.landmarks.ravel().tolist()
    return details


def score_indices(head: Any, vectors: Any, a: np.ndarray, b: np.ndarray) -> PairScores:
    """Score pairs of (N,) indices into the vectors that the head takes, a `Head` or a `FusedHead`."""
    watch = Stopwatch()
    with watch.stage("score"):
        probability, similarity = head.score_pairs(vectors, a, b)
    return PairScores(probability, similarity, watch.seconds, peak_memory())
