"""What a head's held-out pairs can promise: bounds of its thresholds, and the tails that give others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchverify.heads.bounds import (
    CONFIDENCES,
    Tail,
    disjoint_pairs,
    matched_people,
    needed_trials,
    upper_bound,
)
from batchverify.training.calibration import RATES
from batchverify.training.pairs import LabelledPairs

# P(different), (N,) float32, of pairs given by (N,) indices of images.
ScorePairs = Callable[[np.ndarray, np.ndarray], np.ndarray]
DIFFERENT, SAME = 1, 0


@dataclass(frozen=True)
class HeldOut:
    """N pairs of a head that has not learned from them. scores: (N,) P(different)."""

    pairs: LabelledPairs
    scores: np.ndarray

    @classmethod
    def first(cls, pairs: LabelledPairs, scores: np.ndarray) -> HeldOut:
        """The first N pairs of a set. scores: (N,)."""
        return cls(pairs.subset(np.arange(len(scores))), scores)

    def of_label(self, label: int) -> HeldOut:
        """Those of one label."""
        rows = self.pairs.labels == label
        return HeldOut(self.pairs.subset(rows), self.scores[rows])


@dataclass(frozen=True)
class UnseenPairs:
    """Scores of pairs that share nobody, of people whom no weights have seen.

    different, same: (N,) and (M,) float32, P(different). unit: `people`, or `images` if nobody is named.
    """

    different: np.ndarray
    same: np.ndarray
    unit: str

    @classmethod
    def of(cls, *held: HeldOut, score: ScorePairs | None = None) -> UnseenPairs:
        """From held-out pairs. score: of the images of the first set, None if other pairs of them have no score.

        With it, if that set names people, they are matched at random with each other. Otherwise the labelled
        different pairs serve. Of same pairs each person gives one.
        """
        different = [each.of_label(DIFFERENT) for each in held]
        matched = _matched(held[0].pairs, score) if score is not None else different[0]
        if len(matched.scores) > len(_disjoint(different[:1])):
            different[0] = matched
        same = _disjoint([each.of_label(SAME) for each in held])
        unit = "people" if all(each.pairs.persons for each in held if len(each.scores)) else "images"
        return cls(_disjoint(different), same, unit)

    def about(self) -> dict[str, Any]:
        """For a head's metadata, below `thresholds`."""
        tail = Tail.of(self.different)
        return {
            "unit": self.unit,
            "different": tail.to_json(),
            "same": Tail.of(self.same, highest=True).to_json(),
            "guaranteed": [
                {
                    "far": rate,
                    "confidence": confidence,
                    "threshold": tail.bounded(rate, confidence),
                    f"{self.unit}_needed": 2 * needed_trials(rate, confidence),
                }
                for rate in RATES
                for confidence in CONFIDENCES
            ],
        }

    def with_bounds(self, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Thresholds at false accept rates, each with its upper bounds by confidence."""
        bounded = []
        for entry in entries:
            errors = int((self.different < np.float32(entry["threshold"])).sum())
            bounds = {f"{each:g}": upper_bound(errors, len(self.different), each) for each in CONFIDENCES}
            bounded.append({**entry, "bounds": bounds})
        return bounded


def _matched(pairs: LabelledPairs, score: ScorePairs) -> HeldOut:
    """The named people of a set, matched at random."""
    images = np.array(sorted(image for image in pairs.persons if pairs.vectors[image].any()), np.int32)
    a, b = (images[side] for side in matched_people(pairs.groups()[images]))
    labels = np.full(len(a), DIFFERENT, np.int8)
    return HeldOut(replace(pairs, a=a, b=b, labels=labels), score(a, b))


def _disjoint(held: Sequence[HeldOut]) -> np.ndarray:
    """(N,) float32, the scores of pairs that share nobody; a name or a path in two sets is one unit."""
    numbers: dict[tuple[str, str], int] = {}
    units: tuple[list[int], list[int]] = ([], [])
    for each in held:
        for ids, side in zip(units, (each.pairs.a, each.pairs.b), strict=True):
            ids += [numbers.setdefault(_unit(each.pairs, image), len(numbers)) for image in side.tolist()]
    a, b = (np.array(ids, np.int64) for ids in units)
    scores = np.concatenate([each.scores for each in held]).astype(np.float32)
    return scores[disjoint_pairs(a, b)]


def _unit(pairs: LabelledPairs, image: int) -> tuple[str, str]:
    """A name for an image's person or, if that is unknown, for the image."""
    if image in pairs.persons:
        return "person", pairs.persons[image]
    return "image", pairs.image_paths[image] if pairs.image_paths else f"{pairs.name} {image}"
