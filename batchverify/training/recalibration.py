"""A head's calibration, thresholds and bounds fitted anew to labelled pairs; its scorers stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from batchverify.errors import UsageError
from batchverify.evaluation.figures import Metrics, measure
from batchverify.heads.fused_head import FusedHead, all_combinations, combination_key
from batchverify.heads.head import Head
from batchverify.heads.prior import fitted_share
from batchverify.training.calibration import METHODS, f1_threshold, sigmoid
from batchverify.training.fit import FEWEST_FITTED, FOLDS, measured_about, splits
from batchverify.training.guarantees import HeldOut, ScorePairs, UnseenPairs
from batchverify.training.pairs import LabelledPairs

Line = tuple[float, float]


@dataclass(frozen=True)
class ScoredPairs:
    """N labelled pairs with the logits that a head gives them.

    logits: (N,) for each backbone. score: for a head, what scores other pairs of the same images by it; None if only
    the pairs' own scores are known.
    """

    pairs: LabelledPairs
    logits: tuple[np.ndarray, ...]
    score: Callable[[Any], ScorePairs] | None = None

    def subset(self, rows: np.ndarray) -> ScoredPairs:
        """Some of the pairs, by index."""
        return ScoredPairs(self.pairs.subset(rows), tuple(each[rows] for each in self.logits), self.score)


@dataclass(frozen=True)
class Refit:
    """New slopes and offsets of the logits of each backbone, and of the sums of several by their positions."""

    own: tuple[Line, ...]
    sums: Mapping[tuple[int, ...], Line]

    @classmethod
    def of(cls, scored: ScoredPairs, method: str) -> Refit:
        """Fit to labelled pairs. method: of `calibration.METHODS`. Raises `UsageError` if labels look swapped."""
        fit, labels = METHODS[method], scored.pairs.labels
        own = tuple(fit(logits, labels) for logits in scored.logits)
        if min(slope for slope, _ in own) <= 0:
            raise UsageError(
                f"the {scored.pairs.name} pairs with label 1 (different) score no higher than those with label 0 "
                "(same): are the labels swapped?"
            )
        new = [slope * each + offset for each, (slope, offset) in zip(scored.logits, own, strict=True)]
        sums = {
            chosen: fit(np.sum([new[position] for position in chosen], axis=0), labels)
            for chosen in all_combinations(range(len(own)))
        }
        return cls(own, sums)

    def probabilities(self, scored: ScoredPairs) -> np.ndarray:
        """P(different) by all backbones together: (N,) float64."""
        new = [slope * each + offset for each, (slope, offset) in zip(scored.logits, self.own, strict=True)]
        slope, offset = self.sums.get(tuple(range(len(new))), (1.0, 0.0))
        return sigmoid(slope * np.sum(new, axis=0) + offset)

    def applied(self, head: Head | FusedHead) -> Head | FusedHead:
        """The head with the new calibration, its metadata unchanged."""
        if not isinstance(head, FusedHead):
            return _recalibrated(head, self.own[0])
        members = tuple(_recalibrated(*pair) for pair in zip(head.members, self.own, strict=True))
        calibrations = {
            combination_key([members[position].embedding for position in chosen]): line
            for chosen, line in self.sums.items()
        }
        return replace(head, members=members, calibrations=calibrations)


@dataclass(frozen=True)
class Recalibrated:
    """A recalibrated head and what that did.

    before: metrics of the head as it was, at its own threshold. after: those of the new one, cross-validated over
    people; None if there are too few. rates: for each false accept rate that the head stored a threshold for, `far`,
    the `threshold`, and the rate that it really `has` on these pairs.
    """

    head: Head | FusedHead
    before: Metrics
    after: Metrics | None
    rates: Sequence[Mapping[str, float]]


def recalibrate(head: Head | FusedHead, scored: ScoredPairs, method: str) -> Recalibrated:
    """Fit the calibration, the thresholds and their bounds to labelled pairs that the head has not learned from.

    Raises `UsageError` if the labels look swapped.
    """
    pairs, refit = scored.pairs, Refit.of(scored, method)
    new, old = refit.applied(head), _old_probabilities(head, scored)
    if method == "none":
        # Also the sums of several backbones stay as they are.
        new = head
    if scored.score is not None:
        score, impostors = scored.score(new), pairs.impostor_pairs()
        probability = score(pairs.a, pairs.b)
        of_impostors = scored.score(head)(impostors.a, impostors.b), score(impostors.a, impostors.b)
    else:
        score = None
        probability = (old if method == "none" else refit.probabilities(scored)).astype(np.float32)
        of_impostors = old[pairs.labels == 1], probability[pairs.labels == 1]
    unseen = UnseenPairs.of(HeldOut.first(pairs, probability), score=score)
    about = measured_about(old, probability, pairs.labels, (pairs.labels, probability), of_impostors[1], unseen)
    if method != "platt":
        # Without an offset the probabilities stay those for the share of same pairs that they were for.
        about["calibration"]["same_share"] = fitted_share(head.about)
    after, crossed = None, cross_validated(scored, method)
    if crossed is not None:
        # It looks at no labels, so that probabilities out of fold give an honest one.
        after = measure(pairs.labels, crossed, f1_threshold(crossed))
    about["calibration"]["after"] = {"brier": after.brier, "ece": after.ece} if after is not None else None
    about["held_out"] = about["dev"] = asdict(after) if after is not None else None
    before = measure(pairs.labels, old, head.threshold())
    return Recalibrated(replace(new, about={**head.about, **about}), before, after, _rates(head, of_impostors[0]))


def cross_validated(scored: ScoredPairs, method: str) -> np.ndarray | None:
    """P(different) (N,) of each pair by a calibration fitted to pairs of other people; None if there are too few."""
    crossed = np.zeros(len(scored.pairs))
    for inside, outside in splits(scored.pairs, FOLDS, 0):
        labels = scored.pairs.labels[inside]
        if len(inside) < FEWEST_FITTED or labels.min() == labels.max():
            return None
        try:
            refit = Refit.of(scored.subset(inside), method)
        except UsageError:
            return None
        crossed[outside] = refit.probabilities(scored.subset(outside))
    return crossed


def _recalibrated(head: Head, line: Line) -> Head:
    (slope, offset), (old_slope, old_offset) = line, head.calibration
    return replace(head, calibration=(slope * old_slope, slope * old_offset + offset))


def _old_probabilities(head: Head | FusedHead, scored: ScoredPairs) -> np.ndarray:
    """P(different) by the head as it is: (N,) float64."""
    slope, offset = head.calibration(head.members) if isinstance(head, FusedHead) else (1.0, 0.0)
    return sigmoid(slope * np.sum(scored.logits, axis=0) + offset)


def _rates(head: Head | FusedHead, impostors: np.ndarray) -> list[dict[str, float]]:
    """What the stored thresholds let through of (N,) scores of different pairs."""
    return [
        {
            "far": float(entry["far"]),
            "threshold": float(entry["threshold"]),
            "has": float((impostors < np.float32(entry["threshold"])).mean()),
        }
        for entry in head.about["thresholds"]["far"]
    ]
