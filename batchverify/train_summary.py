"""What `train` did: for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchverify.progress import duration


@dataclass(frozen=True)
class TrainSummary:
    """A training's outcome.

    recipes: of the head's members. pairs: by set. about: the head's metadata. metrics: one mapping a seed,
    of `metrics.Metrics` by set (`held_out`, `dev`, `test`). range_tests: rate by network.
    """

    recipes: Sequence[str]
    parameters: int
    pairs: Mapping[str, int]
    left_out: int
    embedded: int
    leaks: int
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    range_tests: Mapping[str, float]
    seconds: float
    head: str
    digest: str
    record: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        about = {name: self.about[name] for name in ("calibration", "thresholds", "training", "embedding")}
        return {**vars(self), "about": about}

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.pairs.items())
        left = f"; {self.left_out:,} left out" if self.left_out else ""
        lines = [
            ("pairs", f"{counts}{left}"),
            ("images embedded", f"{self.embedded:,}"),
            ("head", f"{' + '.join(self.recipes)}, {self.parameters:,} numbers"),
        ]
        lines += [(f"rate of {name}", f"{rate:.2g}") for name, rate in self.range_tests.items()]
        names = [name for name in self.metrics[0] if name != "seed"]
        lines += [(name.replace("_", "-"), self._metrics(name)) for name in names]
        calibration, thresholds = self.about["calibration"], self.about["thresholds"]
        before, after = calibration["before"], calibration["after"]
        lines += [
            (
                "calibration",
                f"on {calibration['held_out_pairs']:,} held-out pairs: Brier {before['brier']:.4f} to "
                f"{after['brier']:.4f}, ECE {before['ece']:.4f} to {after['ece']:.4f}",
            ),
            ("threshold", f"{thresholds['best_f1']:.4f} (best expected F1)"),
            (
                "equal error",
                f"rate {thresholds['equal_error']['rate']:.4f} at {thresholds['equal_error']['threshold']:.4f}",
            ),
            ("false accept", self._rates(thresholds)),
            ("time", duration(self.seconds)),
            ("written to", f"{self.head}, {self.record}"),
        ]
        return lines

    def _metrics(self, name: str) -> str:
        """AUC, F1 and the rest of one set, with the spread over seeds where there are several."""

        def mean(field: str, digits: int) -> str:
            values = [each[name][field] for each in self.metrics]
            spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
            return f"{np.mean(values):.{digits}f}{spread}"

        return (
            f"AUC {mean('auc', 5)}, F1 {mean('f1', 4)} (best possible {mean('best_f1', 4)}), "
            f"accuracy {mean('accuracy', 4)}, Brier {mean('brier', 4)}, ECE {mean('ece', 4)}"
        )

    @staticmethod
    def _rates(thresholds: Mapping[str, Any]) -> str:
        rates = ", ".join(f"{each['far']:g} at {each['threshold']:.4f}" for each in thresholds["far"])
        pairs = f"{thresholds['different_pairs']:,} different pairs"
        return f"{rates} (of {pairs})" if rates else f"no rate: {pairs} support none"
