"""`predict`: the verdict on one pair, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.engine.base import WorkPlan
from batchverify.engine.stages import LoadedImage, Loader, embed_images
from batchverify.errors import NothingScoredError, UsageError, redacted
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.fused_head import FusedHead
from batchverify.heads.head import Head
from batchverify.heads.review_band import VERDICT, VERDICTS, ReviewBand
from batchverify.manifest.paths import ImageRoot
from batchverify.options import ESTIMATE, ScoreOptions
from batchverify.records import Skipped
from batchverify.scoring.base_rate import Judge
from batchverify.scoring.details import details_of
from batchverify.scoring.job import backbone_names, backbone_options, backbone_spec, head_of, work_plan
from batchverify.storage.location import Location, path_text, scheme_of
from batchverify.storage.object_store import SCHEMES

# The choices of `--face`, for people.
CHOICES = {"center": "the largest near the centre", "largest": "the largest", "probable": "the most probable"}
# One forward pass for both images.
PAIR_BATCH = 2


@dataclass(frozen=True)
class Prediction:
    """The verdict on one pair; its figures are None if an image has no embedding.

    probability: of two different people. label: 0 same, 1 different. similarity: cosine. boxes: x0 y0 x1 y1 of
    each face, in pixels. faces: found in each image. errors: reason and message of each image, or None. face: which
    of several faces was taken, as `--face`. backbones: if there are several, those that made the score; boxes, faces
    and errors are then of the first of these, or of the first of all. details: of each image, as in the columns of
    `score`; None if they were not asked for. review: with `--review`, its rates, its thresholds and as `verdict` the
    cell of the column `verdict`.
    """

    images: tuple[str, str]
    probability: float | None
    label: int | None
    similarity: float | None
    threshold: float
    boxes: tuple[Sequence[float] | None, Sequence[float] | None]
    faces: tuple[int, int]
    errors: tuple[Skipped | None, Skipped | None]
    face: str = "center"
    backbones: str | None = None
    details: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
    review: Mapping[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """`same person`, `different people` or `not scored`."""
        if self.label is None:
            return "not scored"
        return "different people" if self.label else "same person"

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        errors = [
            {"reason": error.reason.value, "message": error.message} if error else None for error in self.errors
        ]
        hidden = [name for name in ("backbones", "details", "review") if getattr(self, name) is None]
        known = {name: value for name, value in vars(self).items() if name not in hidden}
        return {**known, "verdict": self.verdict, "errors": errors}

    def sentence(self) -> str:
        """The verdict for people."""
        if self.probability is None or self.similarity is None:
            return "\n".join(["Not scored.", *self._detail_lines()])
        sentence = (
            f"{self.verdict.capitalize()}: the probability that the images show two people is "
            f"{self.probability:.4f} (threshold {self.threshold:.4f}, similarity {self.similarity:.4f})."
        )
        if self.backbones:
            sentence += f" The score is that of {self.backbones}."
        if self.review:
            sentence += (
                f"\nVerdict of --review: {self.review['verdict']} (same below {self.review['same_below']:.4f}, "
                f"different from {self.review['different_from']:.4f})."
            )
        for image, count in zip(self.images, self.faces, strict=True):
            if count > 1:
                sentence += f"\n{image}: {count} faces found; {CHOICES[self.face]} was taken."
        return "\n".join([sentence, *self._detail_lines()])

    def _detail_lines(self) -> list[str]:
        """What is known of each image, one line each."""
        lines = []
        for image, details in zip(self.images, self.details or (), strict=False):
            known = [f"{name} {_shown(value)}" for name, value in details.items() if value is not None]
            lines.append(f"{redacted(image)}: {', '.join(known) or 'nothing known'}")
        return lines

    def require(self) -> None:
        """Raise `NothingScoredError` if there is no probability."""
        sides = zip(self.images, self.errors, strict=True)
        failed = [f"{redacted(image)}: {error.reason.value} ({error.message})" for image, error in sides if error]
        if failed:
            raise NothingScoredError("; ".join(failed))


def predict(
    image_a: str | Path, image_b: str | Path, options: ScoreOptions | None = None, **changes: Any
) -> Prediction:
    """Verify one pair, without Ray. Images are paths or URIs; options are those of `score`.

    With the same cache entries, the result equals that of `score`. A new embedding may change the probability by
    up to 0.05. Raises `ArtifactError` and `UsageError` as `score` does, and `UsageError` for decoded images, arrays
    and bytes: results are cached by the file's bytes.
    """
    images = (path_text(image_a, "image_a"), path_text(image_b, "image_b"))
    options = replace(options or ScoreOptions(), **changes)
    if options.prior == ESTIMATE:
        raise UsageError("--prior estimate: one pair tells no share; give a number, or use `score`")
    each = backbone_options(options)
    specs = [backbone_spec(member) for member in each]
    settings = [member.settings(spec) for member, spec in zip(each, specs, strict=True)]
    known = [EmbeddingFingerprint.of(*pair) for pair in zip(specs, settings, strict=True)]
    head = head_of(options.head, known)
    shifted = Judge.of(head, options).shifted()
    entries = [
        _entries(images, replace(work_plan(*plan), batch_size=PAIR_BATCH))
        for plan in zip(each, settings, known, strict=True)
    ]
    scores = _scores(head, entries)
    scores = shifted(scores) if scores else None
    makers = [pair[0].vector is not None and pair[1].vector is not None for pair in entries]
    first, second = entries[makers.index(True) if any(makers) else 0]
    names = backbone_names(each)
    return Prediction(
        images,
        float(scores[0][0]) if scores else None,
        int(scores[0][0] >= np.float32(shifted.threshold)) if scores else None,
        float(scores[1][0]) if scores else None,
        shifted.threshold,
        (_box(first), _box(second)),
        (first.faces, second.faces),
        (first.skipped, second.skipped),
        options.face,
        "+".join(name for name, made in zip(names, makers, strict=True) if made) if len(each) > 1 else None,
        (details_of(entries[0][0]), details_of(entries[0][1])) if options.details else None,
        _review(shifted.band, scores[0] if scores else None),
    )


def _scores(head: Head | FusedHead, entries: Sequence[tuple[Entry, Entry]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Probability and similarity, (1,) each, of a pair by its entries of each backbone; None without a score."""
    pairs = [[entry.vector for entry in pair] for pair in entries]
    known = [all(vector is not None for vector in pair) for pair in pairs]
    if not any(known):
        return None
    if not isinstance(head, FusedHead):
        return head(*(np.asarray(vector)[None] for vector in pairs[0]))
    empty = [np.zeros((2, member.dimension), np.float16) for member in head.members]
    vectors = [
        (np.stack([np.asarray(vector) for vector in pair]) if has else rows, np.array([has, has]))
        for pair, has, rows in zip(pairs, known, empty, strict=True)
    ]
    return head.score_pairs(vectors, np.array([0]), np.array([1]))


def _review(band: ReviewBand | None, probability: np.ndarray | None) -> dict[str, Any] | None:
    """The rates and thresholds of `--review` and its verdict, None without a score."""
    if band is None:
        return None
    verdict = VERDICTS[int(band.verdicts(probability)[0])] if probability is not None else None
    return {**vars(band), VERDICT: verdict}


def _shown(value: float | Sequence[float]) -> str:
    """A number, or several, for people."""
    return f"{value:.4g}" if isinstance(value, int | float) else " ".join(f"{each:.1f}" for each in value)


def _box(entry: Entry) -> list[float] | None:
    return list(entry.box) if entry.vector is not None else None


def _entries(images: tuple[str, str], plan: WorkPlan) -> tuple[Entry, Entry]:
    """The entries of both images, from the cache if it has them. New ones are added to the cache."""
    paths = [_resolved(image) for image in images]
    loaded, decoded = Loader(plan.load, None)([path for path in paths if isinstance(path, str)])
    failed = {position: Entry(b"", None, skipped=skipped) for position, skipped in loaded.skipped.items()}
    entries = {loaded.keys[position]: entry for position, entry in (loaded.cached | failed).items()}
    if decoded:
        keys = [loaded.keys[position] or b"" for position in loaded.missing]
        entries |= {entry.key: entry for entry in _embed(plan, decoded, keys)}
    known = iter([failed.get(position) or entries[key] for position, key in enumerate(loaded.keys)])
    first, second = (Entry(b"", None, skipped=path) if isinstance(path, Skipped) else next(known) for path in paths)
    return first, second


def _resolved(image: str) -> str | Skipped:
    """The path or URI of an image on the command line, where a URI may carry options."""
    own = Location.parse(".")
    if scheme_of(image) in SCHEMES:
        # What is wrong with the URI becomes a reason below.
        with suppress(UsageError):
            own = Location.parse(image).parent
    return ImageRoot(own).resolve(image)


def _embed(plan: WorkPlan, images: Sequence[LoadedImage], keys: Sequence[bytes]) -> list[Entry]:
    load = plan.load
    cache = EmbeddingCache(load.cache, load.fingerprint) if load.cache is not None else None
    if cache is not None:
        # Before the work, so that a cache that cannot be written is reported at once.
        cache.create()
    # With two images, more threads would spend more time waiting for each other than working.
    embedder = plan.embedder(threads=1)
    entries = embed_images(embedder, images, keys).entries
    if cache is not None:
        cache.compute_path = str(embedder.compute_path)
        cache.append(entries)
        cache.commit()
    return entries
