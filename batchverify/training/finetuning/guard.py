"""Whether fine-tuning helped: the fine-tuned and the frozen backbone on the same pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from batchverify.evaluation.bootstrap import bootstrap
from batchverify.evaluation.figures import Curve, Ranking
from batchverify.heads.prior import Units
from batchverify.training.finetuning.sets import LabelledImages
from batchverify.training.finetuning.vectors import cosines_of

DRAWS = 200
FAR = 1e-2


@dataclass(frozen=True)
class Comparison:
    """The frozen and the fine-tuned backbone on one set of pairs, by cosine.

    frozen, tuned: area under the ROC curve. frozen_tar, tuned_tar: share of same pairs accepted where `FAR` of the
    different ones are. low, high: the 95 % interval of the difference of the areas; None with too few people. unit:
    what the interval draws, `identities` or `images`.
    """

    frozen: float
    tuned: float
    frozen_tar: float
    tuned_tar: float
    low: float | None
    high: float | None
    unit: str

    @property
    def gain(self) -> float:
        """How much higher the fine-tuned backbone's area is."""
        return self.tuned - self.frozen

    @property
    def helped(self) -> bool:
        """Whether the gain is beyond chance, or is a gain at all where chance is not known."""
        return self.gain > 0 and (self.low is None or self.low > 0)

    def sentence(self, name: str) -> str:
        """The verdict for people. name: of the set of pairs."""
        spread = "" if self.low is None else f", 95 % interval {self.low:+.5f} to {self.high:+.5f}"
        figures = f"{name} AUC {self.frozen:.5f} frozen, {self.tuned:.5f} fine-tuned ({self.gain:+.5f}{spread})"
        if self.helped:
            return f"Fine-tuning helped: {figures}."
        if self.gain > 0:
            return f"Fine-tuning may not have helped (the difference is within chance): {figures}."
        return f"Fine-tuning did not help; use the parent: {figures}."


def compare_backbones(pairs: LabelledImages, frozen: np.ndarray, tuned: np.ndarray) -> Comparison:
    """Compare (M, D) unit vectors of the same images by two backbones on labelled pairs."""
    rankings = [Ranking.of(pairs.labels, -cosines_of(vectors, pairs)) for vectors in (frozen, tuned)]
    curves = [ranking.curve() for ranking in rankings]
    units = _units(pairs)

    def figures(weights: np.ndarray) -> dict[str, float]:
        drawn = [ranking.curve(weights) for ranking in rankings]
        before, after = (curve.auc() if curve.both else math.nan for curve in drawn)
        return {"gain": after - before}

    low, high = bootstrap(units, figures, draws=DRAWS).get("gain", (None, None))
    before, after = curves
    return Comparison(before.auc(), after.auc(), _tar(before), _tar(after), low, high, units.kind)


def _units(pairs: LabelledImages) -> Units:
    """The people of the pairs, or their images if nobody is named; an image of nobody named is a unit of its own."""
    named = pairs.people >= 0
    numbers = np.where(named, pairs.people, pairs.people.max(initial=-1) + 1 + np.arange(len(pairs.people)))
    numbers = numbers.astype(np.int32)
    kind = "identities" if named.any() else "images"
    return Units(kind, numbers[pairs.a], numbers[pairs.b], int(numbers.max(initial=-1)) + 1)


def _tar(curve: Curve) -> float:
    """The largest share of same pairs accepted at a threshold that accepts at most `FAR` of the different ones."""
    allowed = curve.false_accepts() <= FAR
    return float(1 - curve.false_rejects()[allowed].min())
