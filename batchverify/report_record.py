"""What the report says about how the scores were made: the run record, and what matters of it first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from batchverify.options import EmbedOptions

# A run record may hold thousands of manifest files.
SHOWN = 2000
# Of a digest: enough to tell it from others at a glance.
DIGEST = 12


def lead(document: Mapping[str, Any]) -> list[tuple[str, str]]:
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
        "Threshold": threshold(document["threshold"]),
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


def everything(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every entry of a run record, as text."""
    return [(name, _shown(value)) for name, value in record.items()]


def changes(comparison: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Rows for what the two runs' records say differently."""
    return [
        {"key": each["key"], "new": _shown(each["new"]), "reference": _shown(each["reference"])}
        for each in (comparison or {}).get("record_differences", [])
    ]


def threshold(value: float | None) -> str | None:
    """As short as tells it from its neighbours: given back as --threshold it makes the same verdicts."""
    return None if value is None else str(np.float32(value))


def _shown(value: Any) -> str:
    if value is None:
        return "not stated"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
