"""A run compared with a reference run: paired differences, flipped verdicts, drift of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.evaluation.bootstrap import bootstrap
from batchverify.evaluation.document import (
    Agreement,
    ComparisonDocument,
    Difference,
    Distribution,
    DistributionDrift,
    Drift,
    RecordDifference,
    Share,
    ShareDrift,
)
from batchverify.evaluation.scores import UNKNOWN, ScoreFile, Scores
from batchverify.fingerprint import differing, flattened
from batchverify.heads.prior import Units

# Keys of run records that cannot explain why scores differ: how the run went, and duplicates.
# fmt: off
OUTCOMES = {
    "cached", "compute_reason", "different", "embedded", "embedder_busy", "failed", "failed_rows", "failures",
    "image_seconds", "images_per_second", "job", "output", "part_rows", "peak_memory_mb", "repeated",
    "resumed", "resumed_rows", "rows", "run_id", "scored", "seconds", "stage_seconds", "token",
    "unique_images", "options.overwrite", "options.quiet", "options.verbose",
    "review.same", "review.different", "review.review",
}
# fmt: on
CALLS = ("same", "different", "not scored")
TRUTHS = ("same", "different", "unknown")
SCATTER = 2000
DISTRIBUTIONS: tuple[Distribution, ...] = ("probability", "similarity")
# The shares that are compared, and their names in reports.
SHARES: dict[Share, str] = {"called_different": "share called different", "failure_rate": "share not scored"}
BINS = 10
# The usual limits for the stability index; Siddiqi 2006, Credit risk scorecards, chapter 6.
SOME, MUCH = 0.1, 0.25
# The 99 % point of chi-squared with `BINS - 1` degrees of freedom.
CHI_SQUARED = 21.666
# Shares differ beyond chance below this p-value.
RARE = 0.01
# The count of an empty bin: half a pair.
EMPTY = 0.5


@dataclass(frozen=True)
class Comparison:
    """A run compared with its reference.

    flipped: rows with another verdict, the largest change first; empty if the pairs are not the same. scatter:
    rows for a plot of both probabilities.
    """

    reference: Scores
    document: ComparisonDocument
    flipped: np.ndarray
    scatter: np.ndarray


def compare(new: Scores, reference: Scores, units: Units | None, *, same: bool, draws: int, seed: int) -> Comparison:
    """Compare two runs. units: of the new run's pairs, or None. same: whether both scored the same pairs.

    If they did not, only the distributions are compared.
    """
    document: ComparisonDocument = {
        "reference": reference.file.name,
        "same_pairs": same,
        "rows": [len(new), len(reference)],
        "threshold": [new.threshold, reference.threshold],
        "record_differences": record_differences(new, reference),
        "reference_record": dict(reference.file.record),
        "drift": measure_drift(new, reference),
    }
    if not same:
        return Comparison(reference, document, np.zeros(0, np.int64), np.zeros(0, np.int64))
    # Indices into `CALLS`.
    calls = [np.where(run.scored, run.calls, 2) for run in (new, reference)]
    moved = np.abs(new.probability - reference.probability)
    flipped = np.flatnonzero((calls[0] != calls[1]) & ~np.isnan(moved))
    document["agreement"] = _agreement(calls, new.truth)
    document["flipped"] = _flips(calls, new.truth, flipped)
    document["differences"] = _differences(new, reference, units, draws, seed)
    ranked = flipped[np.argsort(-moved[flipped], kind="stable")]
    return Comparison(reference, document, ranked, _scatter(moved, ranked, seed))


def same_pairs(new: ScoreFile, reference: ScoreFile) -> bool:
    """Whether two runs scored the same pairs in the same order."""
    # As one type: other programs write texts in other types. Column by column, which bounds memory.
    return new.rows == reference.rows and all(
        new.column(ours).cast(pa.large_string()).equals(reference.column(theirs).cast(pa.large_string()))
        for ours, theirs in zip(new.sides, reference.sides, strict=True)
    )


def record_differences(new: Scores, reference: Scores) -> list[RecordDifference]:
    """How the runs were made differently: dotted keys of their records, and both values; None for a missing key.

    The thresholds are those in use.
    """
    found = differing(_settings(new), _settings(reference))
    return [{"key": key, "new": ours, "reference": theirs} for key, ours, theirs in found]


def _settings(run: Scores) -> dict[str, Any]:
    """How a run was made, by dotted keys of its record."""
    record = flattened(run.file.record) | {"threshold": run.threshold}
    return {
        key: value for key, value in record.items() if not {key, key.partition(".")[0]} & OUTCOMES and value != {}
    }


def _agreement(calls: list[np.ndarray], truth: np.ndarray) -> list[Agreement]:
    """How many pairs of each truth got which verdicts from both runs; combinations that occur."""
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
    known = flipped[truth[flipped] != UNKNOWN]
    fixed = int((calls[0][known] == truth[known]).sum())
    return {"pairs": len(flipped), "fixed": fixed, "broken": len(known) - fixed}


def _differences(new: Scores, reference: Scores, units: Units | None, draws: int, seed: int) -> dict[str, Difference]:
    """Figures of both runs on the labelled pairs that both scored, and their differences, new less reference."""
    rows = np.flatnonzero((new.truth != UNKNOWN) & new.scored & reference.scored)
    if not len(rows):
        return {}
    ours, theirs = (run.pairs_at(rows, new.truth[rows]) for run in (new, reference))

    def differences(weights: np.ndarray | None) -> dict[str, float]:
        first, second = ours.figures(weights), theirs.figures(weights)
        return {name: first[name] - second[name] for name in first}

    spans = {}
    if units is not None and draws:
        drawn = bootstrap(units.subset(rows), differences, draws=draws, seed=seed)
        # Two perfect runs differ in no draw, which does not make their difference certain.
        spans = {name: span for name, span in drawn.items() if span[0] < span[1]}
    first, second = ours.figures(), theirs.figures()
    return {
        name: {"new": first[name], "reference": second[name], "difference": gap, "interval": spans.get(name)}
        for name, gap in differences(None).items()
        if not np.isnan(gap) and "failure" not in name
    }


def _scatter(moved: np.ndarray, flipped: np.ndarray, seed: int) -> np.ndarray:
    """Rows to plot: flipped ones, and a random sample of those that both runs scored."""
    known = np.flatnonzero(~np.isnan(moved))
    drawn = np.random.default_rng(seed).permutation(known)[:SCATTER]
    return np.unique(np.concatenate([flipped[: SCATTER // 2], drawn]))[:SCATTER]


def stability_index(new: np.ndarray, reference: np.ndarray) -> float:
    """Population stability index of (N,) new values over the deciles of (M,) reference values, N, M > 0."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, BINS + 1)[1:-1]))
    ours, theirs = (_bin_shares(values, edges) for values in (new, reference))
    return float(((ours - theirs) * np.log(ours / theirs)).sum())


def _bin_shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    bins = np.searchsorted(edges, values, side="right")
    counts = np.maximum(np.bincount(bins, minlength=len(edges) + 1), EMPTY)
    return counts / counts.sum()


def chance_index(new: int, reference: int) -> float:
    """The index to expect for two samples of these sizes from one distribution."""
    return (BINS - 1) * (1 / new + 1 / reference)


def beyond_chance(index: float, chance: float) -> bool:
    """Whether chance alone gives such an index in at most 1 % of cases.

    index / chance is distributed as chi-squared divided by its degrees of freedom.
    Source: Yurdakul 2018, Statistical properties of the population stability index.
    """
    return index > chance * CHI_SQUARED / (BINS - 1)


def measure_drift(new: Scores, reference: Scores) -> Drift:
    """Drift of probabilities and similarities, and of the shares called different and not scored."""
    runs = (new, reference)
    drift: Drift = {
        "called_different": _share_drift([run.calls[run.scored] for run in runs]),
        "failure_rate": _share_drift([~run.scored for run in runs]),
    }
    for name in DISTRIBUTIONS:
        values = [getattr(run, name) for run in runs]
        known = [each[~np.isnan(each)] for each in values if each is not None]
        if len(known) == len(runs) and all(map(len, known)):
            drift[name] = _distribution_drift(*known)
    return drift


def _distribution_drift(new: np.ndarray, reference: np.ndarray) -> DistributionDrift:
    index, chance = stability_index(new, reference), chance_index(len(new), len(reference))
    return {
        "stability_index": index,
        "expected_by_chance": chance,
        "verdict": _verdict(index, chance),
        "mean": [float(values.mean(dtype=np.float64)) for values in (new, reference)],
        "median": [float(np.median(values)) for values in (new, reference)],
    }


def _share_drift(chosen: list[np.ndarray]) -> ShareDrift:
    """The shares of True in (N,) and (M,) bool, and whether they differ beyond chance by Fisher's exact test.

    The test assumes independent runs, so for two runs of the same pairs it is conservative.
    """
    from scipy.stats import fisher_exact

    shares = [float(each.mean()) if len(each) else None for each in chosen]
    if shares[0] is None or shares[1] is None:
        return {"share": shares, "p_value": None, "verdict": "nothing to compare"}
    _, p = fisher_exact([[int(each.sum()), int((~each).sum())] for each in chosen])
    direction = "no more" if p >= RARE else "more" if shares[0] > shares[1] else "fewer"
    return {"share": shares, "p_value": float(p), "verdict": f"{direction} than chance explains"}


def _verdict(index: float, chance: float) -> str:
    if chance > SOME / 2 and not beyond_chance(index, chance):
        return "too few pairs to tell drift from chance"
    if index < SOME:
        return "no notable drift"
    return "some drift: look at the distributions" if index < MUCH else "strong drift: do not trust old thresholds"
