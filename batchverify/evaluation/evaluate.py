"""`evaluate`: from score outputs to figures, files and the table on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.errors import BatchverifyError
from batchverify.evaluation.bootstrap import Intervals, Units, bootstrap, honest, verdict_trials
from batchverify.evaluation.comparison import SHARES, Comparison, compare, same_pairs
from batchverify.evaluation.figures import NAMES, MeasuredPairs, rate_name, rate_table
from batchverify.evaluation.report import plots
from batchverify.evaluation.report.galleries import galleries
from batchverify.evaluation.report.page import render
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.scores import (
    ScoreFile,
    Scores,
    describe_truth,
    read_scores,
    read_truth,
    read_units,
)
from batchverify.evaluation.slices import (
    FOLD,
    measure_folds,
    measure_slices,
    slices_document,
    summarise_folds,
)
from batchverify.evaluation.worst_pairs import check_target, write_review
from batchverify.manifest.columns import TRUE_LABEL
from batchverify.options import EvaluateOptions
from batchverify.storage.location import Location
from batchverify.version import __version__

# The figures of the table on the terminal; the rest stand in the files.
SHOWN = (
    *("auc", "f1", "precision", "recall", "accuracy", "far", "frr", "failure_rate"),
    *("equal_error", "average_precision", "log_loss", "brier", "ece"),
)
NOT_MEASURED = "–"
EXACT = "exact binomial bound of what was never or always seen, as if pairs were independent"


@dataclass(frozen=True)
class Judged:
    """Everything found out about a run, for the documents made from it."""

    scores: Scores
    pairs: MeasuredPairs
    reference: Scores | None
    comparison: Comparison | None
    document: dict[str, Any]


def evaluate(
    scores: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    options: EvaluateOptions | None = None,
    **changes: Any,
) -> Evaluation:
    """Measure what `score` wrote, and write `metrics.json` and `report.html` into the folder `output`.

    scores: a Parquet file, a folder of parts or a URI. reference: another run, to compare with. Options come
    as an `EvaluateOptions`, as keyword arguments of its fields, or both. Without truth, or with one kind of
    pair only, the figures that need more are null.

    Raises `ManifestError` for scores or a truth that cannot be used, `UsageError` for senseless options.
    """
    started = time.monotonic()
    options = replace(options or EvaluateOptions(), **changes)
    inputs = [os.fspath(each) for each in (scores, reference, options.truth) if each is not None]
    review = check_target(options.export_worst[1], inputs) if options.export_worst else None
    judged = judge(os.fspath(scores), os.fspath(reference) if reference is not None else None, options)
    judged.document["seconds"] = round(time.monotonic() - started, 2)
    written: list[str] = []
    if output is not None:
        written = _write(judged, Location.parse(output), options)
    if review is not None and options.export_worst is not None:
        write_review(judged.scores, options.export_worst[0], review, _source(judged.scores, options))
        written.append(str(review))
    return Evaluation(judged.document, tuple(written))


def judge(name: str, reference: str | None, options: EvaluateOptions) -> Judged:
    """Every figure of a run, and of the run beside its reference."""
    file = ScoreFile.open(name)
    grouped = {name: file.groups(name) for name in options.by}
    truth = read_truth(options.truth, file) if options.truth else None
    scores = read_scores(file, threshold=options.threshold, truth=truth)
    other = _read_reference(reference, options) if reference is not None else None
    same = other is not None and same_pairs(file, other.file)
    source = options.truth
    if other is not None and same and not len(scores.labelled) and len(other.labelled):
        scores, source = (
            replace(scores, truth=other.truth),
            f"{TRUE_LABEL} of the reference {other.file.name}",
        )
    pairs = _labelled(scores)
    units = read_units(file) if options.draws and (len(pairs.scored) or reference) else None
    document = _describe(scores, source)
    intervals = _intervals(pairs, units, scores, options)
    document |= _figures(pairs, intervals)
    document["folds"] = _folds(scores, pairs)
    document["slices"] = {name: _slices(scores, cells, units, options) for name, cells in grouped.items()}
    comparison = None
    if other is not None:
        comparison = compare(scores, other, units, same=same, draws=options.draws, seed=options.seed)
        document["comparison"] = comparison.document
    document["record"] = dict(file.record)
    return Judged(scores, pairs, other, comparison, plain(document))


def _read_reference(name: str, options: EvaluateOptions) -> Scores:
    """The other run at its own threshold; the one given is for a table that states none."""
    file = ScoreFile.open(name)
    return read_scores(file, threshold=None if "threshold" in file.record else options.threshold)


def _labelled(scores: Scores) -> MeasuredPairs:
    rows = scores.labelled
    return MeasuredPairs(scores.truth[rows], scores.probability[rows], scores.threshold)


def _describe(scores: Scores, source: str | None) -> dict[str, Any]:
    scored = int(scores.scored.sum())
    called = int(scores.calls.sum())
    return {
        "version": __version__,
        "scores": scores.file.name,
        "scores_written": scores.file.written(),
        "rows": len(scores),
        "scored": scored,
        "failed": len(scores) - scored,
        "failures": scores.failures(),
        "threshold": scores.threshold,
        "called_different": called,
        "called_same": scored - called,
        "truth": describe_truth(scores, source),
    }


def _intervals(
    pairs: MeasuredPairs, units: Units | None, scores: Scores, options: EvaluateOptions
) -> Intervals | None:
    if units is None or not len(pairs.scored):
        return None
    inside = units.subset(scores.labelled)
    return bootstrap(inside, pairs.figures, draws=options.draws, seed=options.seed)


def _figures(pairs: MeasuredPairs, intervals: Intervals | None) -> dict[str, Any]:
    """Figures, intervals, counts and rates; null where the pairs do not support them."""
    found, counts = pairs.figures(), pairs.counts()
    spans, exact = honest(intervals.spans if intervals else {}, pairs.rate_trials() | verdict_trials(counts))
    equal = pairs.curve.equal_error()[1] if pairs.curve.both else None
    return {
        "metrics": {name: value for name, value in found.items() if not name.startswith("tar@")},
        "intervals": spans,
        "counts": counts,
        "equal_error_threshold": equal,
        "rates": rate_table(pairs, spans),
        "bootstrap": {
            "draws": intervals.draws if intervals else 0,
            "unit": intervals.unit if intervals else None,
            "units": intervals.units if intervals else None,
            "exact": exact,
        },
    }


def _folds(scores: Scores, pairs: MeasuredPairs) -> dict[str, Any] | None:
    if FOLD not in scores.file.schema.names or not len(pairs.scored):
        return None
    cells = scores.file.groups(FOLD).take(pa.array(scores.labelled))
    folds = measure_folds(pairs, cells)
    summary = summarise_folds(folds)
    return None if summary is None else {**summary, "each": [vars(fold) for fold in folds]}


def _slices(
    scores: Scores, cells: pa.ChunkedArray, units: Units | None, options: EvaluateOptions
) -> list[dict[str, Any]]:
    found = measure_slices(scores, cells, units, draws=options.draws, seed=options.seed)
    return slices_document(found)


def _write(judged: Judged, folder: Location, options: EvaluateOptions) -> list[str]:
    page = _page(judged, options)
    contents = {"metrics.json": json.dumps(judged.document, indent=1, allow_nan=False), "report.html": page}
    try:
        if folder.is_local:
            Path(folder.path).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            # Paths may hold lone surrogates, which are no text.
            folder.join(name).write_bytes(text.encode(errors="replace"))
    except OSError as exc:
        raise BatchverifyError(f"{folder}: could not be written: {exc}") from exc
    return [str(folder.join(name)) for name in contents]


def _page(judged: Judged, options: EvaluateOptions) -> str:
    scores, compared = judged.scores, judged.comparison
    source = None if options.no_images else _source(scores, options)
    flipped = compared.flipped if compared is not None else np.zeros(0, np.int64)
    # A row of other pairs says nothing about ours.
    before = judged.reference if judged.document.get("comparison", {}).get("same_pairs") else None
    shown = galleries(scores, before, flipped, most=options.examples, source=source)
    return render(judged.document, _plots(judged), shown)


def _source(scores: Scores, options: EvaluateOptions) -> ImageSource:
    return ImageSource.of(scores.file.record, options.image_root, options.cache)


def _plots(judged: Judged) -> dict[str, Any]:
    scores, pairs, reference = judged.scores, judged.pairs, judged.reference
    found = {
        "histograms": plots.histograms(scores),
        "curves": plots.curves(pairs),
        "calibration": plots.calibration(pairs),
        "explorer": plots.explorer(scores),
        "drift": None,
        "scatter": None,
    }
    if reference is not None and judged.comparison is not None:
        found["drift"] = plots.overlaid(scores, reference)
        found["scatter"] = plots.scatter(scores, reference, judged.comparison.scatter)
    return found


def plain(value: Any) -> Any:
    """Numbers that are none as null, tuples as lists: what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
