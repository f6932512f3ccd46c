"""`evaluate`: from score outputs to `metrics.json`, the report and the table on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from batchverify.errors import BatchverifyError, UsageError
from batchverify.evaluation.base_rate import NAMES as BASE_RATE_NAMES
from batchverify.evaluation.base_rate import measure_base_rate
from batchverify.evaluation.bootstrap import bootstrap, shown_span, with_exact_bounds
from batchverify.evaluation.comparison import DISTRIBUTIONS, SHARES, Comparison, compare, same_pairs
from batchverify.evaluation.discards import measure_discards
from batchverify.evaluation.document import Document, Folds, Measurements, RunSummary
from batchverify.evaluation.evidence import SecondOpinion
from batchverify.evaluation.extremes import extrapolate, extreme_lines
from batchverify.evaluation.figures import NAMES, MeasuredPairs, rate_name, rate_table
from batchverify.evaluation.group_lines import group_lines, quality_lines
from batchverify.evaluation.group_rates import measure_groups
from batchverify.evaluation.groups import read_groups
from batchverify.evaluation.head_threshold import chosen_threshold, with_assumed_share
from batchverify.evaluation.other_scores import OtherScores, open_scores, read_any
from batchverify.evaluation.qualities import read_quality
from batchverify.evaluation.report import plots
from batchverify.evaluation.report.browser import Browser, find_browser
from batchverify.evaluation.report.galleries import galleries
from batchverify.evaluation.report.page import render
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.review_verdicts import NAMES as REVIEW_NAMES
from batchverify.evaluation.review_verdicts import measure_review
from batchverify.evaluation.scores import (
    FROM_REFERENCE,
    ScoreFile,
    Scores,
    describe_truth,
    read_truth,
    read_units,
)
from batchverify.evaluation.slices import FOLD, measure_folds, measure_slices, summarise_folds
from batchverify.evaluation.suspects import (
    Suspects,
    check_suspects_target,
    find_suspects,
    suspect_lines,
    suspects_table,
)
from batchverify.evaluation.tables import as_csv, as_latex
from batchverify.evaluation.worst_pairs import check_target, review_table, worst, write_table
from batchverify.heads.prior import Units
from batchverify.manifest.columns import TRUE_LABEL
from batchverify.options import EvaluateOptions
from batchverify.scoring.summary import shown_review
from batchverify.storage.location import Location, path_text
from batchverify.version import __version__

# The figures of the table on the terminal; the files have all of them.
SHOWN = (
    *("auc", "f1", "precision", "recall", "accuracy", "far", "frr", "failure_rate"),
    *("equal_error", "average_precision", "log_loss", "brier", "ece"),
    *("mcc", "fmr1000", "d_prime", "min_cllr"),
)
Lines = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Judged:
    """A measured run, for the files made from it."""

    scores: Scores
    pairs: MeasuredPairs
    comparison: Comparison | None
    document: Document
    suspects: Suspects | None = None


def evaluate(
    scores: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    options: EvaluateOptions | None = None,
    **changes: Any,
) -> Evaluation:
    """Measure what `score` wrote, and write `metrics.json` and `report.html` into the folder `output`.

    scores: a Parquet file, a folder of parts or a URI. reference: another run, to compare with. Options come
    as an `EvaluateOptions`, as keyword arguments of its fields, or both. Figures that need a truth, or pairs of
    both kinds, are null without them.

    Raises `ManifestError` for scores or a truth that cannot be used, `UsageError` for invalid options.
    """
    started = time.monotonic()
    options = replace(options or EvaluateOptions(), **changes)
    inputs = [path_text(each) for each in (scores, reference, options.truth) if each is not None]
    review = check_target(options.export_worst[1], inputs) if options.export_worst else None
    suspects = check_suspects_target(options.suspects[1], inputs) if options.suspects else None
    if suspects is not None and suspects == review:
        raise UsageError(f"{suspects}: named by --export-worst and --suspects; name two files")
    # Whatever is missing is said before anything is measured.
    browser = find_browser("--pdf" if options.pdf else "--plots") if options.pdf or options.plots else None
    judged = judge(os.fspath(scores), os.fspath(reference) if reference is not None else None, options)
    judged.document["seconds"] = round(time.monotonic() - started, 2)
    written = _write(judged, Location.parse(output), options, browser) if output is not None else []
    if review is not None and options.export_worst is not None:
        rows = worst(judged.scores)[: options.export_worst[0]]
        write_table(review_table(judged.scores, rows, review, _source(judged.scores, options)), review)
        written.append(str(review))
    if suspects is not None and judged.suspects is not None:
        table = suspects_table(judged.scores, judged.suspects, suspects, _source(judged.scores, options))
        write_table(table, suspects)
        written.append(str(suspects))
    return Evaluation(judged.document, tuple(written))


def judge(name: str, reference: str | None, options: EvaluateOptions) -> Judged:
    """Measure a run, and compare it with its reference if there is one."""
    file = open_scores(name, options.score, options.higher_is)
    if options.at_far is not None and not _owns(file, options):
        raise UsageError("--at-far is for scores of ours alone, --score for those of another system")
    grouped = {name: file.groups(name) for name in options.by}
    groups = read_groups(file, options)
    qualities = [read_quality(file, name) for name in options.quality]
    truth = read_truth(options.truth, file) if options.truth else None
    scores = read_any(file, chosen_threshold(file, options) if _owns(file, options) else None, truth)
    scores = with_assumed_share(scores)
    other = with_assumed_share(_read_reference(reference, options, scores)) if reference is not None else None
    same = other is not None and same_pairs(file, other.file)
    truth_source = options.truth
    if other is not None and same and not len(scores.labelled) and len(other.labelled):
        scores, truth_source = replace(scores, truth=other.truth), FROM_REFERENCE + other.file.name
    pairs = scores.labelled_pairs()
    units = read_units(file) if options.draws and (len(pairs.scored) or reference) else None
    draws, seed = options.draws, options.seed
    # Groups count people without draws, too.
    people = (units or read_units(file)) if groups is not None else None
    labelled = units.subset(scores.labelled) if units is not None and len(pairs.scored) else None
    document: dict[str, Any] = {
        **_describe(scores, truth_source),
        **_measurements(pairs, labelled, draws=draws, seed=seed),
        **_other_units(scores, pairs),
        "extremes": extrapolate(pairs, labelled),
        "folds": _folds(scores, pairs),
        "review": measure_review(scores, labelled, draws=draws, seed=seed),
        "base_rate": measure_base_rate(scores, draws=draws, seed=seed),
        "slices": {
            name: measure_slices(scores, cells, units, draws=draws, seed=seed) for name, cells in grouped.items()
        },
        "groups": groups and people and measure_groups(groups, scores, people, draws=draws, seed=seed),
        "quality": [
            measure_discards(each, scores, units, options.wanted_fnmr, draws=draws, seed=seed) for each in qualities
        ],
        "record": dict(file.record),
    }
    comparison = None
    if other is not None:
        comparison = compare(scores, other, units, same=same, draws=draws, seed=seed)
        document["comparison"] = comparison.document
    suspects = _find_suspects(scores, other if same else None, options)
    if suspects is not None:
        document["suspects"] = suspects.document
    return Judged(scores, pairs, comparison, cast(Document, plain(document)), suspects)


def _read_reference(name: str, options: EvaluateOptions, scores: Scores) -> Scores:
    """The other run at its own threshold; `--threshold` serves a table that states none.

    scores: of the run, whose labels are those of another system's table without labels of the same pairs.
    """
    file = open_scores(name, options.score, options.higher_is)
    given = _owns(file, options) and "threshold" not in file.record
    lent = isinstance(file, OtherScores) and TRUE_LABEL not in file.schema.names and same_pairs(scores.file, file)
    return read_any(file, options.threshold if given else None, scores.truth if lent else None)


def _find_suspects(scores: Scores, other: Scores | None, options: EvaluateOptions) -> Suspects | None:
    """other: a run of the same pairs."""
    if options.suspects is None:
        return None
    source, its = (None if each is None or options.no_images else _source(each, options) for each in (scores, other))
    second = SecondOpinion(other, its) if other is not None else None
    return find_suspects(scores, options.suspects[0], source, second)


def _owns(file: ScoreFile, options: EvaluateOptions) -> bool:
    """Whether `--threshold` is in the units of this file: with `--score`, those of the other system."""
    return options.score is None or isinstance(file, OtherScores)


def _other_units(scores: Scores, pairs: MeasuredPairs) -> dict[str, Any]:
    """Of another system: its column, what became 0 and 1, and the thresholds in its own units."""
    file = scores.file
    if not isinstance(file, OtherScores):
        return {}
    equal = pairs.curve.equal_error()[1] if pairs.curve.both else None
    return {
        "score": {
            "column": file.score,
            "higher_is": file.higher_is,
            "scaled_from": [file.low, file.high],
            "threshold": file.unscaled(scores.threshold),
            "equal_error_threshold": file.unscaled(equal),
        }
    }


def _describe(scores: Scores, source: str | None) -> RunSummary:
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


def _measurements(pairs: MeasuredPairs, units: Units | None, *, draws: int, seed: int) -> Measurements:
    """Figures, intervals, counts and rates; NaN or None if the pairs do not support them.

    units: of the pairs, None for no intervals.
    """
    figures, trials = pairs.figures(), pairs.rate_trials() | pairs.tally().trials()
    drawn = bootstrap(units, pairs.figures, draws=draws, seed=seed) if units is not None else {}
    spans, exact = with_exact_bounds(drawn, trials)
    equal = pairs.curve.equal_error()[1] if pairs.curve.both else None
    return {
        "metrics": {name: figures[name] for name in NAMES},
        "intervals": dict(spans),
        "counts": pairs.counts(),
        "equal_error_threshold": equal,
        "rates": rate_table(pairs, spans),
        "bootstrap": {
            "draws": draws if units is not None else 0,
            "unit": units.kind if units is not None else None,
            "units": units.count if units is not None else None,
            "exact": exact,
        },
    }


def _folds(scores: Scores, pairs: MeasuredPairs) -> Folds | None:
    if FOLD not in scores.file.schema.names or not len(pairs.scored):
        return None
    return summarise_folds(measure_folds(pairs, scores.file.groups(FOLD).take(pa.array(scores.labelled))))


def _write(judged: Judged, folder: Location, options: EvaluateOptions, browser: Browser | None) -> list[str]:
    page = _page(judged, options)
    texts = {"metrics.json": json.dumps(judged.document, indent=1, allow_nan=False), "report.html": page}
    if options.tables:
        texts |= {"figures.csv": as_csv(judged.document), "figures.tex": as_latex(judged.document)}
    # Paths may hold lone surrogates, which UTF-8 cannot encode.
    contents = {name: text.encode(errors="replace") for name, text in texts.items()}
    written = _write_all(contents, folder)
    if browser is not None:
        # After the figures, which a browser that fails must not cost.
        drawn = browser.draw(page) if options.plots else {}
        printed = {"report.pdf": browser.print(page)} if options.pdf else {}
        written += _write_all(drawn | printed, folder)
    return written


def _write_all(contents: Mapping[str, bytes], folder: Location) -> list[str]:
    """Write files into a folder, and return their paths."""
    try:
        if folder.is_local:
            Path(folder.path).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            folder.join(name).write_bytes(content)
    except OSError as exc:
        raise BatchverifyError(f"{folder}: could not be written: {exc}") from exc
    return [str(folder.join(name)) for name in contents]


def _page(judged: Judged, options: EvaluateOptions) -> str:
    scores, compared = judged.scores, judged.comparison
    source = None if options.no_images else _source(scores, options)
    flipped = compared.flipped if compared is not None else np.zeros(0, np.int64)
    before = compared.reference if compared is not None and compared.document["same_pairs"] else None
    shown = galleries(scores, before, flipped, most=options.examples, source=source, suspects=judged.suspects)
    return render(judged.document, _plots(judged), shown)


def _source(scores: Scores, options: EvaluateOptions) -> ImageSource:
    return ImageSource.of(
        scores.file.record, options.image_root, options.cache, follow_symlinks=options.follow_symlinks
    )


def _plots(judged: Judged) -> dict[str, Any]:
    scores, pairs, compared = judged.scores, judged.pairs, judged.comparison
    data = {
        "histograms": plots.histograms(scores),
        "curves": plots.curves(pairs),
        "calibration": plots.calibration(pairs) if pairs.calibrated else None,
        "explorer": plots.explorer(scores),
        "discards": [each if each["pairs"] else None for each in judged.document["quality"]],
        "drift": None,
        "scatter": None,
    }
    if compared is not None:
        data["drift"] = plots.overlaid(scores, compared.reference)
        data["scatter"] = plots.scatter(scores, compared.reference, compared.scatter)
    return data


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN and infinities as null, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. document: the content of `metrics.json`. written: paths of the files."""

    document: Document
    written: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document and the paths, for `--json`."""
        return {**self.document, "written": list(self.written)}

    def lines(self) -> list[tuple[str, str]]:
        """The table on the terminal: names and values."""
        parts = (
            self._run,
            self._figures,
            self._rates,
            self._review,
            lambda: extreme_lines(self.document.get("extremes")),
            self._base_rate,
            self._folds,
            self._slices,
            lambda: group_lines(self.document["groups"]),
            lambda: quality_lines(self.document["quality"]),
            self._comparison,
            lambda: suspect_lines(self.document.get("suspects")),
            self._bootstrap,
        )
        return [
            *(line for part in parts for line in part()),
            *(("written to", path) for path in self.written),
        ]

    def _run(self) -> Lines:
        document = self.document
        verdicts = f"{document['called_same']:,} called same, {document['called_different']:,} different"
        yield "pairs", f"{document['rows']:,}, scored {document['scored']:,}: {verdicts}"
        if document["failed"]:
            reasons = ", ".join(f"{name} {count:,}" for name, count in document["failures"].items())
            yield "not scored", f"{document['failed']:,} ({reasons})"
        yield "truth", self._truth()
        yield "threshold", f"{document['threshold']:.4f}"
        if score := document.get("score"):
            text = f"scaled to 0 to 1; the threshold is {score['threshold']:.6g} there"
            yield f"column {score['column']}", text

    def _truth(self) -> str:
        truth = self.document["truth"]
        if not truth["same"] + truth["different"]:
            return "unknown: give a manifest with labels as --truth for error rates"
        unknown = f", {truth['unknown']:,} unknown" if truth["unknown"] else ""
        text = f"{truth['same']:,} same, {truth['different']:,} different{unknown}"
        if not truth["same"] or not truth["different"]:
            text += f"; figures that need {'different' if truth['same'] else 'same'} pairs are left out"
        source = truth["source"] or ""
        return f"{text}; from {source}" if source.startswith(FROM_REFERENCE) else text

    def _figures(self) -> Lines:
        metrics, spans = self.document["metrics"], self.document["intervals"]
        for name in SHOWN:
            if metrics[name] is not None:
                yield NAMES[name], f"{metrics[name]:.5f}{shown_span(spans.get(name), '.4f')}{self._star(name)}"

    def _star(self, name: str) -> str:
        return "*" if name in self.document["bootstrap"]["exact"] else ""

    def _rates(self) -> Lines:
        if all(value is None for value in self.document["metrics"].values()):
            return
        for rate in self.document["rates"]:
            name = f"TAR at FAR {rate['far']:g}"
            if not rate["supported"]:
                # Lower rates need the same pairs and more.
                yield f"{name} and below", str(rate["reason"])
                return
            star = self._star(rate_name(rate["far"]))
            yield name, f"{rate['tar']:.5f}{shown_span(rate['interval'], '.4f')}{star}"

    def _review(self) -> Lines:
        review = self.document["review"]
        if review is not None:
            yield "verdicts", shown_review({**review, **review["verdicts"]}, sum(review["verdicts"].values()))
            for name, text in REVIEW_NAMES.items():
                if review["figures"][name] is not None:
                    star = "*" if name in review["exact"] else ""
                    yield (
                        text,
                        f"{review['figures'][name]:.5f}{shown_span(review['intervals'].get(name), '.4f')}{star}",
                    )

    def _base_rate(self) -> Lines:
        if base := self.document["base_rate"]:
            for name, text in BASE_RATE_NAMES.items():
                if (value := base["estimates"][name]) is not None:
                    yield (
                        text,
                        f"{value:.5f}{shown_span(base['intervals'].get(name), '.4f')}, estimated without labels",
                    )
            yield "drift from the head", f"{base['drift']['verdict']}: {base['drift']['reason']}"

    def _folds(self) -> Lines:
        if folds := self.document["folds"]:
            accuracy = folds["figures"]["accuracy"]
            yield f"{folds['folds']} folds", f"accuracy {accuracy['mean']:.5f} ± {accuracy['std']:.5f}"

    def _slices(self) -> Lines:
        for column, rows in self.document["slices"].items():
            marked = [
                f"{row['value']}: {NAMES[rate]} {row[rate]:.4f}, {direction}"
                for row in rows
                for rate, direction in row["differs"].items()
            ]
            text = "; ".join(marked) or "none differs beyond chance"
            yield f"by {column}", f"{len(rows):,} values; {text}"

    def _comparison(self) -> Lines:
        comparison = self.document.get("comparison")
        if comparison is None:
            return
        drift = comparison["drift"]
        yield "reference", comparison["reference"]
        if changes := comparison["record_differences"]:
            yield "differs in", ", ".join(each["key"] for each in changes)
        if not comparison["same_pairs"]:
            yield "", "the runs scored different pairs: only the distributions are compared"
        for name in DISTRIBUTIONS:
            if name in drift:
                text = f"stability index {drift[name]['stability_index']:.4f}: {drift[name]['verdict']}"
                yield f"drift of {name}", text
        for share, title in SHARES.items():
            new, old = ("–" if each is None else f"{each:.4f}" for each in drift[share]["share"])
            yield title, f"{new}, reference {old}: {drift[share]['verdict']}"
        if "flipped" in comparison:
            flips = comparison["flipped"]
            ways = ", ".join(f"{flips[name]:,} {name}" for name in ("fixed", "broken") if name in flips)
            yield "flipped", f"{flips['pairs']:,} pairs" + (f"; {ways}" if ways else "")
        differences = comparison.get("differences", {})
        for figure in ("auc", "f1", "accuracy"):
            if figure in differences:
                gap, span = differences[figure]["difference"], differences[figure]["interval"]
                yield f"{NAMES[figure]}, new - reference", f"{gap:+.5f}{shown_span(span, '+.4f')}"

    def _bootstrap(self) -> Lines:
        drawn = self.document["bootstrap"]
        if drawn["draws"]:
            units = f"{drawn['units']:,} {drawn['unit']}"
            yield "in brackets", f"95 % bootstrap intervals, {drawn['draws']} draws of {units}"
        if drawn["exact"]:
            yield "*", "exact binomial bound, because all draws agree; assumes independent pairs"
