"""The text of report.html, from the document, the plots and the galleries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from batchverify.evaluation.comparison import RARE, SHARES
from batchverify.evaluation.document import ComparisonDocument, Counts, Document, Interval, Rate
from batchverify.evaluation.figures import NAMES, rate_name
from batchverify.evaluation.report.galleries import Gallery
from batchverify.evaluation.scores import FROM_REFERENCE
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.options import EmbedOptions
from batchverify.version import __version__

NONE = "–"
CARDS = ("auc", "f1", "accuracy", "far", "frr", "equal_error", "failure_rate")
# Id, title and the kinds of labelled pairs that the figure needs.
EXPLORER = (
    ("far", "False accept rate", {"different"}),
    ("frr", "False reject rate", {"same"}),
    ("f1", "F1", {"same", "different"}),
    ("accuracy", "Accuracy", {"same", "different"}),
    ("precision", "Precision", {"same", "different"}),
    ("recall", "Recall", {"different"}),
    ("false-accepts", "False accepts", {"different"}),
    ("false-rejects", "False rejects", {"same"}),
    ("called-same", "Called same", set[str]()),
    ("called-different", "Called different", set[str]()),
)
# The figures in the first table of slices; the others are in a second one.
SLICE_LEAD = ("far", "frr", "f1", "accuracy", "auc")
# For readers who are not statisticians.
MEANINGS = {
    "auc": "the chance that a different pair scores above a same pair; 1 is perfect, guessing gives 0.5",
    "f1": "the harmonic mean of precision and recall",
    "precision": "the share of the pairs called different that are different",
    "recall": "the share of the different pairs that are called different",
    "accuracy": "the share of right verdicts",
    "far": "the share of the different pairs that are called same",
    "frr": "the share of the same pairs that are called different",
    "equal_error": "the mean of the two error rates at the threshold where they are closest",
    "average_precision": "precision averaged over all recalls; guessing gives the share of different pairs",
    "log_loss": "the penalty for wrong probabilities, highest for confident errors; 0 is perfect",
    "brier": "the mean squared error of the probabilities; 0 is perfect, a constant 0.5 gives 0.25",
    "ece": "the mean gap between a probability and the share of pairs with such a probability that are different",
    "failure_rate": "the share of the labelled pairs that could not be scored",
    "far_with_failures": "the false accept rate if a failed pair counts as not accepted",
    "frr_with_failures": "the false reject rate if a failed pair counts as rejected",
}
# The longest value of a run record that is shown whole; a record may list thousands of manifest files.
SHOWN = 2000
# The characters of a digest that are shown.
DIGEST = 12


def render(document: Document, plots: Mapping[str, Any], galleries: Sequence[Gallery]) -> str:
    """The page. plots: the data of the plots by name. galleries: the pairs to show."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "figure": figure, "threshold": shown_threshold}
    comparison = document.get("comparison")
    measured = any(value is not None for value in document["metrics"].values())
    return environment.from_string(_asset("report.html")).render(
        d=document,
        measured=measured,
        comparison=comparison,
        plots=plots,
        galleries=galleries,
        notes=notes(document),
        cards=_figures(document, CARDS) if measured else [],
        figures=_figures(document, tuple(NAMES)),
        meanings=[(_title(NAMES[name]), text) for name, text in MEANINGS.items()],
        rates=_rates(document["rates"], document["bootstrap"]["exact"]),
        differences=_differences(comparison),
        explorer=_explorer(document["counts"]),
        sections=_sections(document, plots, galleries, measured),
        shares=SHARES,
        rare=RARE,
        changes=record_changes(comparison),
        slices=[_slices(column, rows) for column, rows in document["slices"].items()],
        lead=record_lead(document) if document["record"] else [],
        record=record_entries(document["record"]),
        # The template marks these as safe: our own files and Plotly's script, and JSON without `<`.
        css=_asset("report.css"),
        js=_script(_asset("report.js")),
        plotly=_script(get_plotlyjs()),
        data=embedded_json({"threshold": document["threshold"], "plots": plots, "version": __version__}),
    )


def _asset(name: str) -> str:
    return (files("batchverify.evaluation.report") / name).read_text(encoding="utf8")


def _script(text: str) -> str:
    """A script that cannot end its element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embedded_json(value: Any) -> str:
    """JSON that cannot end its element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def notes(document: Document) -> list[str]:
    """What the reader must know first."""
    truth, texts = document["truth"], []
    labelled = truth["same"] + truth["different"]
    if not document["scored"]:
        texts.append("No pair could be scored: see the failures below.")
    if not labelled:
        texts.append(
            "The truth is unknown, so there are no error rates. Give a manifest with labels as --truth."
        )
    elif not truth["same"] or not truth["different"]:
        missing = "different" if truth["same"] else "same"
        texts.append(f"No pair is labelled {missing}: figures that need such pairs are left out.")
    if (truth["source"] or "").startswith(FROM_REFERENCE):
        texts.append(f"The truth is from {truth['source']}: the scores have none of their own.")
    if truth["unknown"] and labelled:
        texts.append(f"The figures leave out pairs without a label: {count(truth['unknown'])}.")
    return texts


def _sections(
    document: Document, plots: Mapping[str, Any], galleries: Sequence[Gallery], measured: bool
) -> list[tuple[str, str]]:
    """Ids and titles of the page's sections."""
    sections = [
        ("figures", "Figures", measured),
        ("distributions", "Distributions", plots.get("histograms")),
        ("curves", "Error curves", plots.get("curves")),
        ("calibration", "Calibration", plots.get("calibration")),
        ("explorer", "Threshold explorer", plots.get("explorer")),
        *((f"slices-{number}", f"By {column}", True) for number, column in enumerate(document["slices"], 1)),
        ("folds", "Folds", document["folds"]),
        ("comparison", "Comparison", document.get("comparison")),
        *((each.id, each.title, True) for each in galleries),
        ("record", "Run record", True),
    ]
    return [(name, title) for name, title, present in sections if present]


def _explorer(counts: Counts) -> list[tuple[str, str]]:
    """Ids and titles of the figures that follow the slider."""
    scored = {"same": counts["same"], "different": counts["different"]}
    return [(name, title) for name, title, kinds in EXPLORER if all(scored[kind] for kind in kinds)]


def _figures(document: Document, names: Sequence[str]) -> list[dict[str, str]]:
    """Rows of the table: name, value and interval as texts."""
    metrics, spans, exact = document["metrics"], document["intervals"], document["bootstrap"]["exact"]
    return [
        {
            "name": _title(NAMES[name]),
            "value": figure(metrics[name]),
            "span": _span(spans.get(name), name in exact),
        }
        for name in names
        if metrics[name] is not None
    ]


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _rates(rates: Sequence[Rate], exact: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            **rate,
            "far": f"{rate['far']:g}".replace("e-0", "e-"),
            "tar": figure(rate["tar"]),
            "threshold": shown_threshold(rate["threshold"]),
            "span": _span(rate["interval"], rate_name(rate["far"]) in exact),
        }
        for rate in rates
    ]


def _slices(column: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A column's values: the rows of the first table, titles and rows of the second."""
    names = dict.fromkeys(name for row in rows for name in row if name in NAMES or name.startswith("tar@"))
    others = [
        name for name in names if name not in SLICE_LEAD and any(row.get(name) is not None for row in rows)
    ]
    lead = []
    for row in rows:
        spans = {name: _span(row["intervals"].get(name), name in row["exact"]) for name in ("far", "frr")}
        lead.append({**row, "spans": spans})
    return {
        "column": column,
        "rows": lead,
        "others": [_figure_title(name) for name in others],
        "figures": [(row["value"], [figure(row.get(name)) for name in others]) for row in rows],
    }


def _figure_title(name: str) -> str:
    return _title(NAMES.get(name, f"TAR at FAR {name.removeprefix('tar@')}"))


def _differences(comparison: ComparisonDocument | None) -> list[dict[str, Any]]:
    if comparison is None:
        return []
    rows = []
    for name, each in comparison.get("differences", {}).items():
        span = each["interval"]
        rows.append(
            {
                "name": _figure_title(name),
                "new": figure(each["new"]),
                "reference": figure(each["reference"]),
                "difference": f"{each['difference']:+.5f}",
                "span": f"{span[0]:+.5f} to {span[1]:+.5f}" if span else "",
                "beyond_chance": bool(span and span[0] * span[1] > 0),
            }
        )
    return rows


def count(value: int) -> str:
    """A whole number with commas."""
    return f"{value:,}"


def figure(value: float | None) -> str:
    """A rate or probability with five decimals, small ones with an exponent; a dash for none."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def shown_threshold(value: float | None) -> str:
    """A threshold as text that --threshold takes; a dash for none."""
    return threshold_text(value) or NONE


def _span(span: Interval | None, exact: bool = False) -> str:
    """An interval, with a star if it is exact and not the bootstrap's."""
    return f"{figure(span[0])} to {figure(span[1])}{'*' * exact}" if span else ""


def record_lead(document: Document) -> list[tuple[str, str]]:
    """The main entries of the run record, those that it has: names and texts."""
    record = document["record"]
    embedding, options = record.get("embedding") or {}, record.get("options") or {}
    backbone, head = record.get("backbone_fingerprint"), record.get("head")
    # Of several backbones.
    digests = " + ".join(map(_digest, str(backbone).split("+")))
    crops = [
        _crop(each.document.get("crop"), each.document.get("tta"))
        for each in EmbeddingFingerprint(embedding).members
    ]
    entries = {
        "Backbone": backbone and f"{options.get('backbone', EmbedOptions.backbone)}, {digests}",
        "Crop": " + ".join(crop for crop in crops if crop),
        "Head": head and f"{options.get('head', 'default')}, {_digest(head)}",
        "Threshold": threshold_text(document["threshold"]),
        "Scores written": document["scores_written"],
    }
    return [(name, text) for name, text in entries.items() if text]


def _digest(text: Any) -> str:
    return str(text)[:DIGEST]


def _crop(crop: Any, tta: Any) -> str | None:
    if not isinstance(crop, Mapping) or "mode" not in crop:
        return None
    margin = f", margin {crop['margin']}" if "margin" in crop else ""
    views = f", augmented views {tta}" if tta not in (None, "none") else ""
    return f"{crop['mode']}{margin}{views}"


def record_entries(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every entry of a run record, as text."""
    return [(name, _shown(value)) for name, value in record.items()]


def record_changes(comparison: ComparisonDocument | None) -> list[dict[str, str]]:
    """Rows for the entries in which the two run records differ."""
    return [
        {"key": each["key"], "new": _shown(each["new"]), "reference": _shown(each["reference"])}
        for each in (comparison["record_differences"] if comparison else [])
    ]


def threshold_text(value: float | None) -> str | None:
    """The shortest text that gives the same verdicts as --threshold."""
    return None if value is None else str(np.float32(value))


def _shown(value: Any) -> str:
    if value in (None, ""):
        return "not stated"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
