"""One pair, in this process: what `predict` says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.engine.base import WorkPlan
from batchverify.engine.stages import Loader, embed_images
from batchverify.errors import NothingScoredError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.manifest.paths import ImageRoot
from batchverify.options import ScoreOptions
from batchverify.records import Skipped
from batchverify.scoring.job import backbone_fingerprint, work_plan
from batchverify.storage.location import Location

# One forward pass for both images.
PAIR_BATCH = 2


@dataclass(frozen=True)
class Prediction:
    """The verdict on one pair; the numbers are None when a side has no embedding.

    probability: of two different people. label: 0 same, 1 different. similarity: cosine. boxes: x0 y0 x1 y1
    of the faces in pixels. errors: reason and message of each side, or None.
    """

    images: tuple[str, str]
    probability: float | None
    label: int | None
    similarity: float | None
    threshold: float
    boxes: tuple[Sequence[float] | None, Sequence[float] | None]
    faces: tuple[int, int]
    errors: tuple[Skipped | None, Skipped | None]

    @property
    def verdict(self) -> str:
        """`same person`, `different people` or `not scored`."""
        if self.label is None:
            return "not scored"
        return "different people" if self.label else "same person"

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        errors = [
            {"reason": each.reason.value, "message": each.message} if each else None for each in self.errors
        ]
        return {**vars(self), "verdict": self.verdict, "errors": errors}

    def sentence(self) -> str:
        """The verdict for people."""
        if self.probability is None or self.similarity is None:
            return "Not scored."
        sentence = (
            f"{self.verdict.capitalize()}: the probability that the images show two people is "
            f"{self.probability:.4f} (threshold {self.threshold:.4f}, similarity {self.similarity:.4f})."
        )
        for image, count in zip(self.images, self.faces, strict=True):
            if count > 1:
                sentence += f"\n{image}: {count} faces found; the largest near the centre was taken."
        return sentence

    def require(self) -> None:
        """Raise `NothingScoredError` when there is no probability."""
        sides = zip(self.images, self.errors, strict=True)
        failed = [f"{image}: {each.reason.value} ({each.message})" for image, each in sides if each]
        if failed:
            raise NothingScoredError("; ".join(failed))


def predict(
    image_a: str | Path, image_b: str | Path, options: ScoreOptions | None = None, **changes: Any
) -> Prediction:
    """Verify one pair, without Ray. Images are paths or URIs; options are those of `score`.

    From the same cache entries the numbers are those of `score`; a fresh embedding may move the
    probability by up to 0.05. Raises `ArtifactError` and `UsageError` as `score` does.
    """
    import numpy as np

    from batchverify.heads.head import find_head

    options = replace(options or ScoreOptions(), **changes)
    fingerprint = EmbeddingFingerprint.of(backbone_fingerprint(options), options.settings)
    head = find_head(options.head, fingerprint)
    threshold = head.threshold(options.threshold, options.at_far)
    images = (str(image_a), str(image_b))
    plan = replace(work_plan(options, options.settings, fingerprint), batch_size=PAIR_BATCH)
    first, second = _entries(images, plan)
    probability = label = similarity = None
    if first.vector is not None and second.vector is not None:
        scores = head(first.vector[None], second.vector[None])
        probability, similarity = (float(each[0]) for each in scores)
        label = int(scores[0][0] >= np.float32(threshold))
    pair = (first, second)
    boxes = tuple(list(each.box) if each.vector is not None else None for each in pair)
    return Prediction(
        images,
        probability,
        label,
        similarity,
        threshold,
        (boxes[0], boxes[1]),
        (first.faces, second.faces),
        (first.skipped, second.skipped),
    )


def _entries(images: tuple[str, str], plan: WorkPlan) -> tuple[Entry, Entry]:
    """The two images' entries, from the cache where it has them; what is embedded here goes into it."""
    root = ImageRoot(Location.parse("."))
    image_paths = [root.resolve(image) for image in images]
    named = [each for each in image_paths if isinstance(each, str)]
    loaded, pictures = Loader(plan.load, None)(named)
    entries = {loaded.keys[at]: entry for at, entry in loaded.cached.items()}
    unread = {at: Entry(b"", None, skipped=each) for at, each in loaded.skipped.items()}
    entries |= {loaded.keys[at]: entry for at, entry in unread.items()}
    keys = [loaded.keys[position] or b"" for position in loaded.missing]
    if pictures:
        entries |= {entry.key: entry for entry in _embed(plan, pictures, keys)}
    known = iter([unread.get(at) or entries[key] for at, key in enumerate(loaded.keys)])
    first, second = (
        Entry(b"", None, skipped=each) if isinstance(each, Skipped) else next(known) for each in image_paths
    )
    return first, second


def _embed(plan: WorkPlan, pictures: Sequence[Any], keys: Sequence[bytes]) -> list[Entry]:
    load = plan.load
    cache = EmbeddingCache(load.cache, load.fingerprint) if load.cache is not None else None
    if cache is not None:
        # Before the work: a cache that cannot be written is said at once.
        cache.create()
    # For two images more threads wait for each other longer than they work.
    embedder = plan.embedder(threads=1)
    entries = embed_images(embedder, pictures, keys).entries
    if cache is not None:
        cache.set_compute_path(str(embedder.compute_path))
        cache.append(entries)
        cache.commit()
    return entries
