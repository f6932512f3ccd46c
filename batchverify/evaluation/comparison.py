"""A run beside a reference run: paired differences, flips, and how far the scores have drifted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.evaluation.bootstrap import Units, bootstrap
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.scores import UNKNOWN, ScoreFile, Scores
from batchverify.fingerprint import flattened

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
# Shares of pairs that are compared, and what people read for them.
SHARES = {"called_different": "share called different", "failure_rate": "share not scored"}
BINS = 10
# The usual reading of the index; Siddiqi 2006, Credit risk scorecards, chapter 6.
SOME, MUCH = 0.1, 0.25
# The 99 % point of chi-squared with `BINS - 1` degrees of freedom.
CHI_SQUARED = 21.666
# A share that differs so seldom by chance is said to have changed.
RARE = 0.01
# What stands for an empty bin: half a pair.
EMPTY = 0.5


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
    flat = [flattened(each.file.record) | {"threshold": each.threshold} for each in (new, reference)]
    keys = sorted(key for key in flat[0].keys() | flat[1].keys() if not _outcome(key))
    pairs = [(key, flat[0].get(key), flat[1].get(key)) for key in keys]
    return [{"key": key, "new": ours, "reference": other} for key, ours, other in pairs if ours != other]


def _outcome(key: str) -> bool:
    return key in OUTCOMES or key.partition(".")[0] in OUTCOMES


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


def stability_index(new: np.ndarray, reference: np.ndarray) -> float:
    """Population stability index of (N,) new numbers over the deciles of (M,) reference ones, both not empty."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, BINS + 1)[1:-1]))
    shares = [
        _shares(np.searchsorted(edges, each, side="right"), len(edges) + 1) for each in (new, reference)
    ]
    return float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())


def _shares(places: np.ndarray, bins: int) -> np.ndarray:
    counts = np.maximum(np.bincount(places, minlength=bins), EMPTY)
    return counts / counts.sum()


def chance_index(new: int, reference: int) -> float:
    """The index to expect of two draws of so many numbers from one distribution."""
    return (BINS - 1) * (1 / new + 1 / reference)


def beyond_chance(index: float, chance: float) -> bool:
    """Whether chance alone gives such an index once in a hundred times or less often.

    Over the index that chance gives on average it is distributed as chi-squared over its degrees of freedom.
    Source: Yurdakul 2018, Statistical properties of the population stability index.
    """
    return index > chance * CHI_SQUARED / (BINS - 1)


def measure_drift(new: Scores, reference: Scores) -> dict[str, Any]:
    """Index and verdict for probabilities and similarities; shares called different and failed, in both runs."""
    runs = (new, reference)
    document: dict[str, Any] = {
        "called_different": _shares_of([each.calls[each.scored] for each in runs]),
        "failure_rate": _shares_of([~each.scored for each in runs]),
    }
    for name in ("probability", "similarity"):
        values = [getattr(each, name) for each in (new, reference)]
        if any(each is None for each in values):
            continue
        known = [each[~np.isnan(each)] for each in values]
        if min(map(len, known)):
            index, chance = stability_index(*known), chance_index(len(known[0]), len(known[1]))
            document[name] = {
                "stability_index": index,
                "expected_by_chance": chance,
                "verdict": _verdict(index, chance),
                "mean": [float(each.mean(dtype=np.float64)) for each in known],
                "median": [float(np.median(each)) for each in known],
            }
    return document


def _shares_of(chosen: list[np.ndarray]) -> dict[str, Any]:
    """The shares of two runs' pairs that are chosen, (N,) bool each, and whether they differ beyond chance.

    Fisher's exact test: it takes the runs for independent, which of two runs of the same pairs errs on the
    side of saying nothing.
    """
    from scipy.stats import fisher_exact

    seen, of = [int(each.sum()) for each in chosen], [len(each) for each in chosen]
    shares = [part / whole if whole else None for part, whole in zip(seen, of, strict=True)]
    if None in shares:
        return {"share": shares, "p_value": None, "verdict": "nothing to compare"}
    p = float(fisher_exact([[part, whole - part] for part, whole in zip(seen, of, strict=True)]).pvalue)
    more = seen[0] * of[1] > seen[1] * of[0]
    verdict = (
        f"{'more' if more else 'fewer'} than chance explains" if p < RARE else "no more than chance explains"
    )
    return {"share": shares, "p_value": p, "verdict": verdict}


def _verdict(index: float, chance: float) -> str:
    if chance > SOME / 2 and not beyond_chance(index, chance):
        return "too few pairs to tell drift from chance"
    if index < SOME:
        return "no notable drift"
    return (
        "some drift: look at the distributions"
        if index < MUCH
        else "strong drift: do not trust old thresholds"
    )
