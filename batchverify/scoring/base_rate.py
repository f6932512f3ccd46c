"""`--prior`: the share of same pairs that the probabilities of a run are for, given or estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batchverify.engine.fused_table import Table
from batchverify.engine.stages import score_indices
from batchverify.errors import UsageError
from batchverify.heads.drift import DRIFT, checked, independent_pairs
from batchverify.heads.prior import BaseRate, Units, estimate, fitted_share
from batchverify.manifest.columns import cell_names
from batchverify.options import ESTIMATE, ScoreOptions
from batchverify.scoring.job import Job
from batchverify.scoring.rows import Rows

if TYPE_CHECKING:
    from batchverify.heads.fused_head import FusedHead
    from batchverify.heads.head import Head
    from batchverify.heads.review_band import ReviewBand

# Rows from which the share is estimated.
SAMPLED_ROWS = 100_000
_SEED = 0
_PERSONS = ("person_a", "person_b")


@dataclass(frozen=True)
class Prior:
    """What `--prior` asks of a head.

    share: of same pairs; None to estimate it. moves: the threshold is one of the head and moves with the
    probabilities; a threshold that the user named does not. fitted: the share for which the head was calibrated.
    """

    share: float | None
    moves: bool
    fitted: float

    @classmethod
    def of(cls, head: Head | FusedHead, options: ScoreOptions) -> Prior | None:
        """None without the option."""
        if options.prior is None:
            return None
        share = None if options.prior == ESTIMATE else float(options.prior)
        return cls(share, options.threshold is None, fitted_share(head.about))

    def document(self) -> dict[str, Any]:
        """Its part of a job's document, in which the threshold is that before the shift."""
        return {"prior": self.share or ESTIMATE, "threshold_moves": self.moves}


@dataclass(frozen=True)
class Shifted:
    """How a run's probabilities are shifted, the thresholds for them, and what its record says of the share.

    rate: None without `--prior`, when nothing is shifted and the record is None. band: of three verdicts, or None.
    """

    rate: BaseRate | None
    threshold: float
    band: ReviewBand | None
    record: Mapping[str, Any] | None

    def __call__(self, scores: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) probability and similarity, the first shifted."""
        return scores if self.rate is None else (self.rate(scores[0]), scores[1])


@dataclass(frozen=True)
class Judge:
    """What gives scores and verdicts. band: of three verdicts, with `--review`. prior: shifts the probabilities."""

    head: Head | FusedHead
    threshold: float
    band: ReviewBand | None = None
    prior: Prior | None = None

    @classmethod
    def of(cls, head: Head | FusedHead, options: ScoreOptions) -> Judge:
        """The head with the thresholds that the options choose. Raises `UsageError` for those that it lacks."""
        threshold = head.threshold(options.threshold, options.at_far, options.confidence)
        band = head.review(*options.review) if options.review is not None else None
        return cls(head, threshold, band, Prior.of(head, options))

    def shifted(self, record: Mapping[str, Any] | None = None) -> Shifted:
        """The shift that the options ask for. record: of an estimated share, by default of the given one."""
        prior, threshold, band = self.prior, self.threshold, self.band
        if prior is None:
            return Shifted(None, threshold, band, None)
        record = record or {"share": prior.share, "source": "given", "calibrated_for": prior.fitted}
        # The thresholds of a band are the head's: they always move.
        ends = (band.same_below, band.different_from) if band is not None else ()
        rate = BaseRate(float(record["share"]), prior.fitted, (threshold, *ends) if prior.moves else ends)
        if band is not None:
            low, high = map(rate.threshold, ends)
            band = replace(band, same_below=low, different_from=high)
        return Shifted(rate, rate.threshold(threshold) if prior.moves else threshold, band, record)


def shifted_for(judge: Judge, job: Job, embeddings: Table, rows: Rows) -> Shifted:
    """The shift of a run whose images are embedded. Raises `UsageError` if its share cannot be estimated.

    rows: keep an estimate, so that all parts of an output and every resumed run have the same.
    """
    if judge.prior is None or judge.prior.share is not None:
        return judge.shifted()
    record = rows.kept_prior()
    if record is None:
        record = estimated(job, judge.head, embeddings, judge.prior.fitted)
        rows.keep_prior(record)
    return judge.shifted(record)


def estimated(job: Job, head: Head | FusedHead, embeddings: Table, fitted: float) -> dict[str, Any]:
    """The record of the share that a sample of the manifest's rows gives, the same for the same vectors.

    Raises `UsageError` if no row has a score, or if the scores look unlike those that the head was calibrated on.
    """
    a, b, units = _sample(job)
    usable = embeddings.usable(a, b)
    probability = score_indices(head, embeddings.vectors, a[usable], b[usable]).probability
    shared = Units.of(units.kind, units.a[usable], units.b[usable])
    drift = checked(head.about, probability, independent_pairs(shared.a, shared.b))
    if drift.verdict == DRIFT:
        raise UsageError(f"--prior estimate: {drift.reason}, so no estimate holds; give the share as --prior P")
    found = estimate(probability, fitted, shared, seed=_SEED)
    # Of no share does Bayes' rule say anything: at least half a pair is taken to be of either kind.
    least = 0.5 / found.pairs
    share = min(max(found.share, least), 1 - least)
    return {
        **asdict(found),
        "share": share,
        "source": "estimated",
        "calibrated_for": fitted,
        "drift": dict(vars(drift)),
    }


def _sample(job: Job) -> tuple[np.ndarray, np.ndarray, Units]:
    """The images of at most `SAMPLED_ROWS` rows, drawn by a seed, (N,) int64 each, and what the pairs share."""
    total = job.scan.rows
    chosen = np.arange(total)
    if total > SAMPLED_ROWS:
        drawn = np.random.default_rng(_SEED).choice(total, SAMPLED_ROWS, replace=False, shuffle=False)
        chosen = np.sort(drawn)
    sides: tuple[list[np.ndarray], ...] = ([], [])
    names: tuple[list[Any], ...] = ([], [])
    for block in job.manifest.blocks(job.scan):
        start, stop = np.searchsorted(chosen, (block.first, block.first + len(block.a)))
        rows = chosen[start:stop] - block.first
        for side, images in enumerate((block.a, block.b)):
            sides[side].append(images[rows])
            names[side].extend(_people(block.carried, rows, side))
    a, b = (np.concatenate([np.zeros(0, np.int64), *each]) for each in sides)
    return a, b, _units(a, b, names)


def _people(carried: pa.RecordBatch, rows: np.ndarray, side: int) -> list[str | None]:
    """The name of the person on one side of some rows, None where the manifest has none."""
    kinds = [carried.schema.field(name).type for name in _PERSONS if name in carried.schema.names]
    if len(kinds) < len(_PERSONS) or any(map(pa.types.is_nested, kinds)):
        return [None] * len(rows)
    column = pa.chunked_array([carried.column(_PERSONS[side]).take(pa.array(rows))])
    return list(cell_names(column).to_pylist())


def _units(a: np.ndarray, b: np.ndarray, names: tuple[list[str | None], ...]) -> Units:
    """People where they are known, images elsewhere."""
    images, people = np.concatenate([a, b]).tolist(), [*names[0], *names[1]]
    units = [image if name is None else name for image, name in zip(images, people, strict=True)]
    codes: dict[Any, int] = {}
    first, second = np.split(np.array([codes.setdefault(unit, len(codes)) for unit in units], np.int64), 2)
    kind = "identities" if any(name is not None for name in people) else "images"
    return Units(kind, first, second, len(codes))
