"""report.html: one file that opens offline, with plots, a threshold explorer and the run record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from batchverify.evaluation.comparison import SHARES
from batchverify.evaluation.figures import NAMES, rate_name
from batchverify.options import EmbedOptions
from batchverify.version import __version__

NONE = "–"
CARDS = ("auc", "f1", "accuracy", "far", "frr", "equal_error", "failure_rate")
# Id, title and the kinds of labelled pairs that it takes.
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
# What the table of slices leads with; the other figures stand in a second one.
SLICE_LEAD = ("far", "frr", "f1", "accuracy", "auc")
# For a reader who is no statistician.
MEANINGS = {
    "auc": "the chance that of one different and one same pair the different one has the higher probability; "
    "1 is perfect, 0.5 a guess",
    "f1": "precision and recall in one number, their harmonic mean",
    "precision": "of the pairs called different, the share that is",
    "recall": "of the different pairs, the share called so",
    "accuracy": "the share of right verdicts",
    "far": "of the different pairs, the share called same",
    "frr": "of the same pairs, the share called different",
    "equal_error": "the error rates at the threshold where the two are nearest to each other, their mean",
    "average_precision": "precision averaged over all recalls; a guess gets the share of different pairs",
    "log_loss": "the cost of wrong probabilities, where a sure error costs most; 0 is perfect",
    "brier": "the mean squared distance of probability and truth; 0 is perfect, 0.25 is always saying 0.5",
    "ece": "how far, on average, a probability lies from the share of its like that is different",
    "failure_rate": "of the labelled pairs, the share that could not be scored",
    "far_with_failures": "the false accept rate when a pair that failed counts as not accepted",
    "frr_with_failures": "the false reject rate when a pair that failed counts as rejected",
}
# A run record may hold thousands of manifest files.
SHOWN = 2000
# Of a digest: enough to tell it from others at a glance.
DIGEST = 12


def render(
    document: Mapping[str, Any], plots: Mapping[str, Any], galleries: Sequence[Mapping[str, Any]]
) -> str:
    """The page. document: what `metrics.json` holds. plots: the numbers of `plots`. galleries: pairs to show."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
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
        differences=_differences(comparison or {}),
        explorer=_explorer(document["counts"]),
        sections=_sections(document, plots, galleries, measured),
        shares=SHARES,
        changes=record_changes(comparison),
        slices=[_slices(column, rows) for column, rows in document["slices"].items()],
        lead=record_lead(document) if document["record"] else [],
        record=record_entries(document["record"]),
        # Scripts and styles of our own and of Plotly; the data are escaped by themselves.
        css=Markup(_asset("report.css")),
        js=Markup(_script(_asset("report.js"))),
        plotly=Markup(_script(get_plotlyjs())),
        data=Markup(
            embedded_json({"threshold": document["threshold"], "plots": plots, "version": __version__})
        ),
    )


def _asset(name: str) -> str:
    return (files("batchverify.evaluation.report") / name).read_text(encoding="utf8")


def _script(text: str) -> str:
    """A script that cannot end its element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embedded_json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def notes(document: Mapping[str, Any]) -> list[str]:
    """What the reader must know before anything else."""
    found = []
    truth = document["truth"]
    if not document["scored"]:
        found.append("No pair could be scored: see the failures below.")
    if not truth["same"] + truth["different"]:
        found.append("The truth is unknown: no error rates. Give a manifest with labels as --truth.")
    elif not truth["same"] or not truth["different"]:
        missing = "same" if not truth["same"] else "different"
        found.append(f"No pair is labelled {missing}: figures that need such pairs are left out.")
    if truth["source"] and " of the reference " in truth["source"]:
        found.append(f"The truth is from {truth['source']}: the scores have none of their own.")
    if truth["unknown"] and truth["same"] + truth["different"]:
        found.append(f"{count(truth['unknown'])} pairs without a label take no part in the figures.")
    return found


def _sections(
    document: Mapping[str, Any],
    plots: Mapping[str, Any],
    galleries: Sequence[Mapping[str, Any]],
    measured: bool,
) -> list[tuple[str, str]]:
    """Ids and titles of what the page holds."""
    found = [
        ("figures", "Figures", measured),
        ("distributions", "Distributions", plots.get("histograms")),
        ("curves", "Error curves", plots.get("curves")),
        ("calibration", "Calibration", plots.get("calibration")),
        ("explorer", "Threshold explorer", plots.get("explorer")),
        *((f"slices-{at}", f"By {column}", True) for at, column in enumerate(document["slices"], 1)),
        ("folds", "Folds", document["folds"]),
        ("comparison", "Reference", document.get("comparison")),
        *((each["id"], each["title"], True) for each in galleries),
        ("record", "Run record", True),
    ]
    return [(name, title) for name, title, there in found if there]


def _explorer(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Ids and titles of the figures that follow the slider."""
    there = {kind for kind in ("same", "different") if counts[kind]}
    return [(name, title) for name, title, kinds in EXPLORER if kinds <= there]


def _figures(document: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, str]]:
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


def _title(name: str | None) -> str:
    return name[0].upper() + name[1:] if name else ""


def _rates(rates: Sequence[Mapping[str, Any]], exact: Sequence[str]) -> list[dict[str, Any]]:
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
    more = [
        name for name in names if name not in SLICE_LEAD and any(row.get(name) is not None for row in rows)
    ]
    lead = [
        {
            **row,
            "spans": {
                name: _span(row["intervals"].get(name), name in row["exact"]) for name in ("far", "frr")
            },
        }
        for row in rows
    ]
    return {
        "column": column,
        "rows": lead,
        "more": [_figure_title(name) for name in more],
        "figures": [(row["value"], [figure(row.get(name)) for name in more]) for row in rows],
    }


def _figure_title(name: str) -> str:
    return _title(NAMES.get(name)) or f"TAR at FAR {name.removeprefix('tar@')}"


def _differences(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
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
    """A rate or probability: five digits after the point, small ones by their exponent, a dash for none."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def shown_threshold(value: float | None) -> str:
    """A threshold that can be given back, or a dash for none."""
    return threshold_text(value) or NONE


def _span(span: Sequence[float] | None, exact: bool = False) -> str:
    """An interval; with a star where it is no bootstrap's."""
    return f"{figure(span[0])} to {figure(span[1])}{'*' * exact}" if span else ""


def record_lead(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader asks first: names and texts; what the record does not say is left out.

    document: what `metrics.json` holds.
    """
    record = document["record"]
    embedding, options = record.get("embedding") or {}, record.get("options") or {}
    backbone, head = record.get("backbone_fingerprint"), record.get("head")
    found = {
        "Backbone": backbone and f"{options.get('backbone', EmbedOptions.backbone)}, {_digest(backbone)}",
        "Crop": _crop(embedding.get("crop"), embedding.get("tta")),
        "Head": head and f"{options.get('head', 'the default one')}, {_digest(head)}",
        "Threshold": threshold_text(document["threshold"]),
        "Scores written": document["scores_written"],
    }
    return [(name, text) for name, text in found.items() if text]


def _digest(text: Any) -> str:
    return str(text)[:DIGEST]


def _crop(crop: Any, tta: Any) -> str | None:
    if not isinstance(crop, Mapping) or "mode" not in crop:
        return None
    margin = f", margin {crop['margin']}" if "margin" in crop else ""
    views = f", views {tta}" if tta not in (None, "none") else ""
    return f"{crop['mode']}{margin}{views}"


def record_entries(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every entry of a run record, as text."""
    return [(name, _shown(value)) for name, value in record.items()]


def record_changes(comparison: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Rows for what the two runs' records say differently."""
    return [
        {"key": each["key"], "new": _shown(each["new"]), "reference": _shown(each["reference"])}
        for each in (comparison or {}).get("record_differences", [])
    ]


def threshold_text(value: float | None) -> str | None:
    """As short as tells it from its neighbours: given back as --threshold it makes the same verdicts."""
    return None if value is None else str(np.float32(value))


def _shown(value: Any) -> str:
    if value is None:
        return "not stated"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
