"""What `evaluate` found: for machines as `metrics.json` holds it, for people as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchverify.drift import SHARES
from batchverify.measured import NAMES, rate_name

# The figures of the table on the terminal; the rest stand in the files.
SHOWN = (
    *("auc", "f1", "precision", "recall", "accuracy", "far", "frr", "failure_rate"),
    *("equal_error", "average_precision", "log_loss", "brier", "ece"),
)
NOT_MEASURED = "–"
EXACT = "exact binomial bound of what was never or always seen, as if pairs were independent"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's outcome. document: what `metrics.json` holds. written: the files, by path."""

    document: Mapping[str, Any]
    written: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self.document, "written": list(self.written)}

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        document = self.document
        lines = [("pairs", self._pairs())]
        if document["failed"]:
            reasons = ", ".join(f"{name} {count:,}" for name, count in document["failures"].items())
            lines.append(("not scored", f"{document['failed']:,} ({reasons})"))
        lines += [("truth", self._truth()), ("threshold", f"{document['threshold']:.4f}")]
        metrics = document["metrics"]
        if any(value is not None for value in metrics.values()):
            lines += [(NAMES[name], self._figure(name)) for name in SHOWN if metrics[name] is not None]
            lines += self._rates()
        lines += self._folds() + self._slices() + self._comparison()
        lines += self._bootstrap()
        lines += [("written to", path) for path in self.written]
        return lines

    def _bootstrap(self) -> list[tuple[str, str]]:
        drawn = self.document["bootstrap"]
        if not drawn["draws"]:
            return []
        how = f"95 % by bootstrap, {drawn['draws']} draws of {drawn['units']:,} {drawn['unit']}"
        return [("in brackets", how), *([("*", EXACT)] if drawn["exact"] else [])]

    def _pairs(self) -> str:
        document = self.document
        verdicts = f"{document['called_same']:,} called same, {document['called_different']:,} different"
        return f"{document['rows']:,}, scored {document['scored']:,}: {verdicts}"

    def _truth(self) -> str:
        truth = self.document["truth"]
        if not truth["same"] + truth["different"]:
            return "unknown: give a manifest with labels as --truth for error rates"
        unknown = f", {truth['unknown']:,} unknown" if truth["unknown"] else ""
        text = f"{truth['same']:,} same, {truth['different']:,} different{unknown}"
        missing = [name for name in ("same", "different") if not truth[name]]
        text += f"; figures that need {missing[0]} pairs are left out" if missing else ""
        return f"{text}; from {truth['source']}" if " of the reference " in truth["source"] else text

    def _figure(self, name: str) -> str:
        value, span = self.document["metrics"][name], self.document["intervals"].get(name)
        return f"{value:.5f}{interval(span)}{self._star(name)}"

    def _star(self, name: str) -> str:
        return "*" if name in self.document["bootstrap"]["exact"] else ""

    def _rates(self) -> list[tuple[str, str]]:
        lines, said = [], ""
        for rate in self.document["rates"]:
            name = f"TAR at FAR {rate['far']:g}"
            if rate["supported"]:
                lines.append(
                    (
                        name,
                        f"{rate['tar']:.5f}{interval(rate['interval'])}{self._star(rate_name(rate['far']))}",
                    )
                )
            elif not said:
                # What the first one lacks the rarer ones lack, too.
                said = rate["reason"]
                lines.append((f"{name} and below", said))
        return lines

    def _folds(self) -> list[tuple[str, str]]:
        folds = self.document["folds"]
        if not folds:
            return []
        accuracy = folds["figures"]["accuracy"]
        return [(f"{folds['folds']} folds", f"accuracy {accuracy['mean']:.5f} ± {accuracy['std']:.5f}")]

    def _slices(self) -> list[tuple[str, str]]:
        lines = []
        for column, slices in self.document["slices"].items():
            marked = [
                f"{each['value']}: {NAMES[rate]} {each[rate]:.4f}, {how}"
                for each in slices
                for rate, how in each["differs"].items()
            ]
            text = "; ".join(marked) or "none differs beyond chance"
            lines.append((f"by {column}", f"{len(slices):,} values; {text}"))
        return lines

    def _comparison(self) -> list[tuple[str, str]]:
        found = self.document.get("comparison")
        if found is None:
            return []
        lines = [("reference", found["reference"])]
        if found["record_differences"]:
            lines.append(("differs in", ", ".join(each["key"] for each in found["record_differences"])))
        if not found["same_pairs"]:
            lines.append(("", "other pairs: only the distributions are compared"))
        for name in ("probability", "similarity"):
            if name in found["drift"]:
                drift = found["drift"][name]
                text = f"stability index {drift['stability_index']:.4f}: {drift['verdict']}"
                lines.append((f"drift of {name}", text))
        lines += [(title, share_text(found["drift"][name])) for name, title in SHARES.items()]
        if "flipped" in found:
            lines.append(("flipped", flips_text(found["flipped"])))
        for name in ("auc", "f1", "accuracy"):
            if name in found.get("differences", {}):
                each = found["differences"][name]
                lines.append(
                    (
                        f"{NAMES[name]}, new - reference",
                        f"{each['difference']:+.5f}{interval(each['interval'], '+')}",
                    )
                )
        return lines


def share_text(drift: Mapping[str, Any]) -> str:
    """A share in both runs, and whether the difference is more than chance."""
    new, reference = (NOT_MEASURED if each is None else f"{each:.4f}" for each in drift["share"])
    return f"{new}, reference {reference}: {drift['verdict']}"


def flips_text(flips: Mapping[str, int]) -> str:
    """How many pairs flipped, and which way where the truth is known."""
    ways = [f"{flips[name]:,} {name}" for name in ("fixed", "broken") if name in flips]
    return "; ".join([f"{flips['pairs']:,} pairs", *([", ".join(ways)] if ways else [])])


def interval(span: Any, sign: str = "") -> str:
    """An interval in brackets, nothing where there is none."""
    return f"  [{span[0]:{sign}.4f}, {span[1]:{sign}.4f}]" if span else ""
