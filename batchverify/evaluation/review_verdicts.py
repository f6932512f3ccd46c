"""What the three verdicts of `score --review` were worth: how large the band is, and the errors in and outside it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import ManifestError
from batchverify.evaluation.bootstrap import bootstrap, with_exact_bounds
from batchverify.evaluation.document import Interval, ReviewDocument
from batchverify.evaluation.scores import Scores
from batchverify.heads.prior import Units
from batchverify.heads.review_band import DIFFERENT, REVIEW, SAME, VERDICT, VERDICTS

# The figures and their names for people.
NAMES = {
    "far": "different pairs called same",
    "frr": "same pairs called different",
    "error_decided": "wrong among the decided",
    "error_review": "wrong in the band by the threshold",
    "error_all": "wrong by the threshold, all pairs",
}


def measure_review(scores: Scores, units: Units | None, *, draws: int, seed: int) -> ReviewDocument | None:
    """Counts and error rates by verdict; None if the run had no `--review`.

    units: of the labelled pairs, None for no intervals. Raises `ManifestError` for other verdicts than the three.
    """
    record = scores.file.record.get("review")
    if VERDICT not in scores.file.schema.names or not isinstance(record, dict):
        return None
    if not {"far", "frr", "same_below", "different_from"} <= record.keys():
        raise ManifestError(f"{scores.file.name}: the run record lacks the rates and thresholds of --review")
    verdicts = _verdicts(scores)
    rows = scores.labelled
    labelled = rows[verdicts[rows] >= 0]
    wrong = scores.calls[labelled] != (scores.truth[labelled] == 1)
    # A cell for each truth, verdict and whether the label is wrong.
    cells = (scores.truth[labelled].astype(np.int64) * 3 + verdicts[labelled]) * 2 + wrong
    kept = np.flatnonzero(verdicts[rows] >= 0)
    counts = np.bincount(cells, minlength=12).reshape(2, 3, 2)
    trials = _trials(counts)
    drawn: dict[str, Interval] = {}
    exact: list[str] = []
    if units is not None and len(labelled):
        unit = units.subset(kept)

        def figures(weights: np.ndarray) -> dict[str, float]:
            return _shares(_trials(np.bincount(cells, weights, 12).reshape(2, 3, 2)))

        spans, exact = with_exact_bounds(bootstrap(unit, figures, draws=draws, seed=seed), trials)
        drawn = dict(spans)
    totals = np.bincount(verdicts[verdicts >= 0], minlength=3)
    return {
        "far": record["far"],
        "frr": record["frr"],
        "same_below": record["same_below"],
        "different_from": record["different_from"],
        "verdicts": dict(zip(VERDICTS, totals.tolist(), strict=True)),
        "share": float(totals[2] / totals.sum()) if totals.sum() else 0.0,
        "truth": {
            name: dict(zip(VERDICTS, counts[code].sum(axis=1).tolist(), strict=True))
            for code, name in enumerate((SAME, DIFFERENT))
        },
        "figures": dict(_shares(trials)),
        "intervals": drawn,
        "exact": exact,
    }


def _verdicts(scores: Scores) -> np.ndarray:
    """(N,) int8, indices of `VERDICTS`; -1 for a pair that was not scored."""
    cells = scores.file.column(VERDICT).cast(pa.string())
    codes = pc.index_in(cells, value_set=pa.array(VERDICTS))
    unknown = pc.and_(pc.is_null(codes), pc.is_valid(cells)).to_numpy(zero_copy_only=False)
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise ManifestError(
            f"{scores.file.name}: row {row + 1}: column '{VERDICT}' must hold {SAME}, {DIFFERENT} or {REVIEW}, got "
            f"{cells[row].as_py()!r}"
        )
    found: np.ndarray = codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int8)
    return np.where(scores.scored, found, np.int8(-1))


def _trials(counts: np.ndarray) -> dict[str, tuple[float, float]]:
    """(part, whole) of each figure. counts: (truth, verdict, label is wrong), (2, 3, 2)."""
    by_verdict, wrong = counts.sum(axis=2), counts[:, :, 1].sum(axis=0)
    missed = float(by_verdict[0, 1] + by_verdict[1, 0])
    parts = {
        "far": (by_verdict[1, 0], by_verdict[1].sum()),
        "frr": (by_verdict[0, 1], by_verdict[0].sum()),
        "error_decided": (missed, by_verdict[:, :2].sum()),
        "error_review": (wrong[2], by_verdict[:, 2].sum()),
        "error_all": (wrong.sum(), counts.sum()),
    }
    return {name: (float(part), float(whole)) for name, (part, whole) in parts.items()}


def _shares(trials: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The figures; NaN of nothing."""
    return {name: part / whole if whole else float("nan") for name, (part, whole) in trials.items()}
