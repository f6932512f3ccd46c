"""The text of report.html, from the document, the plots and the galleries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from batchverify.evaluation.base_rate import NAMES as BASE_RATE_NAMES
from batchverify.evaluation.comparison import RARE, SHARES
from batchverify.evaluation.document import Document, Interval
from batchverify.evaluation.figures import NAMES, rate_name
from batchverify.evaluation.report.galleries import Gallery
from batchverify.evaluation.report.plots import heat
from batchverify.evaluation.review_verdicts import NAMES as REVIEW_NAMES
from batchverify.evaluation.scores import FROM_REFERENCE
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.options import EmbedOptions
from batchverify.version import __version__

NONE = "–"
CARDS = ("auc", "f1", "accuracy", "far", "frr", "equal_error", "failure_rate")
# Id, title and the kinds of scored pairs that the figure needs, as in `Tally`.
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
    "mcc": "the correlation of truth and verdict; 1 is perfect, guessing gives 0",
    "hter": "the mean of the two error rates at the threshold",
    "fmr100": "the false reject rate where at most 1 in 100 different pairs is accepted",
    "fmr1000": "the false reject rate where at most 1 in 1,000 different pairs is accepted",
    "zero_fmr": "the false reject rate where no different pair of this sample is accepted",
    "d_prime": "how far the mean log-odds of same and different pairs lie apart, in standard deviations",
    "cllr": "the cost of the probabilities as likelihood ratios, in bits; 0 is perfect, no information gives 1",
    "min_cllr": "the same cost after the best recalibration; Cllr less this is what calibration loses",
}
# The longest value of a run record that is shown whole; a record may list thousands of manifest files.
SHOWN = 2000
# The characters of a digest that are shown.
DIGEST = 12


def render(document: Document, plots: Mapping[str, Any], galleries: Sequence[Gallery]) -> str:
    """The page. plots: the data of the plots by name. galleries: the pairs to show."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "entry": _entry,
        "figure": figure,
        "name": _title,
        "others": _others,
        "ratio": ratio,
        "short": short,
        "span": _span,
        "threshold": shown_threshold,
    }
    truth = document["truth"]
    measured = any(value is not None for value in document["metrics"].values())
    return environment.from_string(_asset("report.html")).render(
        d=document,
        exact=document["bootstrap"]["exact"],
        measured=measured,
        comparison=document.get("comparison"),
        plots=plots,
        galleries=galleries,
        labelled=truth["same"] + truth["different"],
        from_reference=(truth["source"] or "").startswith(FROM_REFERENCE),
        cards=CARDS,
        base_rate_names=BASE_RATE_NAMES,
        meanings=MEANINGS,
        rate_name=rate_name,
        explorer=[each[:2] for each in EXPLORER if all(document["counts"][kind] for kind in each[2])],
        shares=SHARES,
        rare=RARE,
        heat=heat(document["groups"]["matrix"]["fmr"]) if document["groups"] else [],
        review_names=REVIEW_NAMES,
        lead=record_lead(document),
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


def _title(name: str) -> str:
    """The title of a figure of `MeasuredPairs.figures`."""
    text = NAMES.get(name, f"TAR at FAR {name.removeprefix('tar@')}")
    # d' is a symbol.
    return text if "'" in text else text[:1].upper() + text[1:]


def _others(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures in the second table of slices: those that any row has."""
    names = dict.fromkeys(name for row in rows for name in row if name in NAMES or name.startswith("tar@"))
    return [name for name in names if name not in SLICE_LEAD and any(row.get(name) is not None for row in rows)]


def figure(value: float | None) -> str:
    """A rate or probability with five decimals, small ones with an exponent; a dash for none."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """A ratio or coefficient with three digits after the point, large ones with fewer; a dash for none."""
    return NONE if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def short(value: float | None) -> str:
    """A rate with two digits; a dash for none."""
    return NONE if value is None else f"{value:.2g}"


def shown_threshold(value: float | None) -> str:
    """The shortest text that gives the same verdicts as --threshold; a dash for none."""
    return NONE if value is None else str(np.float32(value))


def _span(span: Interval | None, exact: bool) -> str:
    """An interval, with a star if it is exact and not the bootstrap's."""
    return f"{figure(span[0])} to {figure(span[1])}{'*' * exact}" if span else ""


def record_lead(document: Document) -> list[tuple[str, str]]:
    """The main entries of the run record, those that it has: names and texts."""
    record = document["record"]
    embedding, options = record.get("embedding") or {}, record.get("options") or {}
    backbone, head = record.get("backbone_fingerprint"), record.get("head")
    # Of several backbones.
    digests = " + ".join(each[:DIGEST] for each in str(backbone).split("+"))
    crops = [
        _crop(each.document.get("crop"), each.document.get("tta")) for each in EmbeddingFingerprint(embedding).members
    ]
    entries = {
        "Backbone": backbone and f"{options.get('backbone', EmbedOptions.backbone)}, {digests}",
        "Crop": " + ".join(crop for crop in crops if crop),
        "Head": head and f"{options.get('head', 'default')}, {str(head)[:DIGEST]}",
        "Threshold": shown_threshold(document["threshold"]),
        "Scores written": document["scores_written"],
    }
    return [(name, text) for name, text in entries.items() if text]


def _crop(crop: Any, tta: Any) -> str | None:
    if not isinstance(crop, Mapping) or "mode" not in crop:
        return None
    margin = f", margin {crop['margin']}" if "margin" in crop else ""
    views = f", augmented views {tta}" if tta not in (None, "none") else ""
    return f"{crop['mode']}{margin}{views}"


def _entry(value: Any) -> str:
    """A value of a run record."""
    if value in (None, ""):
        return "not stated"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
