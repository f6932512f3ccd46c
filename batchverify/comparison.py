"""Two runs of one manifest side by side: differences with paired intervals, agreement, the pairs that flipped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.bootstrap import Units, bootstrap
from batchverify.drift import measure_drift
from batchverify.measured import MeasuredPairs
from batchverify.score_files import ScoreFile
from batchverify.scores import UNKNOWN, Scores

# What a run record says about how the run went, and what stands in it twice: no reason why scores differ.
# fmt: off
OUTCOMES = {
    "cached", "compute_reason", "different", "embedded", "embedder_busy", "failed", "failed_rows", "failures",
    "image_seconds", "images_per_second", "job", "output", "part_rows", "peak_memory_mb", "repeated",
    "resumed", "resumed_rows", "rows", "run_id", "scored", "seconds", "stage_seconds", "token",
    "unique_images", "options.overwrite", "options.quiet", "options.verbose",
}
# fmt: on
CALLS = ("same", "different", "not scored")
TRUTHS = ("same", "different", "unknown")
SCATTER = 2000


@dataclass(frozen=True)
class Comparison:
    """A run beside its reference. flipped: rows called otherwise, the largest change first; empty where the
    pairs are not the same. scatter: rows for a plot of both probabilities."""

    document: dict[str, Any]
    flipped: np.ndarray
    scatter: np.ndarray


def compare(
    new: Scores, reference: Scores, units: Units | None, *, same: bool, draws: int, seed: int
) -> Comparison:
    """Compare two runs. units: of the new run's pairs, or None. same: whether both scored the same pairs.

    Of other pairs only the distributions are compared.
    """
    document: dict[str, Any] = {
        "reference": reference.file.name,
        "same_pairs": same,
        "rows": [len(new), len(reference)],
        "threshold": [new.threshold, reference.threshold],
        "record_differences": record_differences(new, reference),
        "reference_record": dict(reference.file.record),
        "drift": measure_drift(new, reference),
    }
    if not same:
        return Comparison(document, np.zeros(0, np.int64), np.zeros(0, np.int64))
    calls = [_calls(each) for each in (new, reference)]
    moved = np.abs(new.probability - reference.probability)
    flipped = np.flatnonzero((calls[0] != calls[1]) & ~np.isnan(moved))
    document["agreement"] = _agreement(calls, new.truth)
    document["flipped"] = _flips(calls, new.truth, flipped)
    document["differences"] = _differences(new, reference, units, draws, seed)
    ranked = flipped[np.argsort(-moved[flipped], kind="stable")]
    return Comparison(document, ranked, _scatter(moved, ranked, seed))


def same_pairs(new: ScoreFile, reference: ScoreFile) -> bool:
    """Whether two runs scored the same pairs in the same order."""
    return new.rows == reference.rows and pairs_digest(new) == pairs_digest(reference)


def record_differences(new: Scores, reference: Scores) -> list[dict[str, Any]]:
    """What both runs say differently about how they were made: each key with dots, and its two values.

    The thresholds are those in use. A key that one record lacks is None there.
    """
    flat = [dict(_flat(each.file.record)) | {"threshold": each.threshold} for each in (new, reference)]
    keys = sorted(key for key in flat[0].keys() | flat[1].keys() if not _outcome(key))
    pairs = [(key, flat[0].get(key), flat[1].get(key)) for key in keys]
    return [{"key": key, "new": ours, "reference": other} for key, ours, other in pairs if ours != other]


def _outcome(key: str) -> bool:
    return key in OUTCOMES or key.partition(".")[0] in OUTCOMES


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def pairs_digest(file: ScoreFile) -> str:
    """A hash of the two columns of images, however they are cut into files and batches."""
    lengths, texts = (tuple(hashlib.sha256() for _ in file.sides) for _ in range(2))
    for batch in file.batches(file.sides):
        for side, cells in enumerate(batch.columns):
            filled = cells.cast(pa.large_string()).fill_null("\0")
            lengths[side].update(pc.binary_length(filled).to_numpy().tobytes())
            texts[side].update("".join(filled.to_pylist()).encode())
    return "".join(each.hexdigest() for each in (*lengths, *texts))


def _calls(scores: Scores) -> np.ndarray:
    """(N,) int64 into `CALLS`."""
    return np.where(scores.scored, scores.calls.astype(np.int64), 2)


def _agreement(calls: list[np.ndarray], truth: np.ndarray) -> list[dict[str, Any]]:
    """How many pairs of each truth got which verdicts from both; the rows that occur."""
    kinds = np.where(truth == UNKNOWN, 2, truth).astype(np.int64)
    counts = np.bincount((kinds * 3 + calls[0]) * 3 + calls[1], minlength=27).reshape(3, 3, 3)
    return [
        {
            "truth": TRUTHS[kind],
            "new": CALLS[new],
            "reference": CALLS[old],
            "pairs": int(counts[kind, new, old]),
        }
        for kind, new, old in np.argwhere(counts).tolist()
    ]


def _flips(calls: list[np.ndarray], truth: np.ndarray, flipped: np.ndarray) -> dict[str, int]:
    """fixed: wrong in the reference and right now; broken: the other way round; neither without any truth."""
    if (truth == UNKNOWN).all():
        return {"pairs": len(flipped)}
    known, right = truth[flipped], calls[0][flipped] == truth[flipped]
    return {
        "pairs": len(flipped),
        "fixed": int((right & (known != UNKNOWN)).sum()),
        "broken": int((~right & (known != UNKNOWN)).sum()),
    }


def _differences(
    new: Scores, reference: Scores, units: Units | None, draws: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of both runs on the labelled pairs that both scored, and what the new one has more."""
    rows = np.flatnonzero((new.truth != UNKNOWN) & new.scored & reference.scored)
    if not len(rows):
        return {}
    both = [
        MeasuredPairs(new.truth[rows], each.probability[rows], each.threshold) for each in (new, reference)
    ]

    def differences(weights: np.ndarray | None) -> dict[str, float]:
        first, second = (each.figures(weights) for each in both)
        return {name: first[name] - second[name] for name in first}

    spans = {}
    if units is not None and draws:
        drawn = bootstrap(units.subset(rows), differences, draws=draws, seed=seed).spans
        # Two perfect runs differ in no draw: that does not make it certain.
        spans = {name: span for name, span in drawn.items() if span[0] < span[1]}
    first, second, gaps = both[0].figures(), both[1].figures(), differences(None)
    return {
        name: {"new": first[name], "reference": second[name], "difference": gap, "interval": spans.get(name)}
        for name, gap in gaps.items()
        if not np.isnan(gap) and "failure" not in name
    }


def _scatter(moved: np.ndarray, flipped: np.ndarray, seed: int) -> np.ndarray:
    """Rows to plot: the flipped ones first, then a random draw of the others that both runs scored."""
    known = np.flatnonzero(~np.isnan(moved))
    drawn = np.random.default_rng(seed).permutation(known)[:SCATTER]
    return np.unique(np.concatenate([flipped[: SCATTER // 2], drawn]))[:SCATTER]
