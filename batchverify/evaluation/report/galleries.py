"""The galleries of the report: pairs with their faces, scores and paths, as the page shows them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np

from batchverify.evaluation import worst_pairs
from batchverify.evaluation.report.thumbnails import ImageSource, Thumbnail, thumbnails
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.evaluation.worst_pairs import Example

log = logging.getLogger(__name__)

TRUTHS = {0: "same person", 1: "two people", UNKNOWN: "unknown"}
# Folders that all paths start with are printed once from so many characters on.
LONG = 16
NO_IMAGE = Thumbnail(None, "no image shown")


def galleries(
    scores: Scores, reference: Scores | None, flipped: np.ndarray, *, most: int, source: ImageSource | None
) -> list[dict[str, Any]]:
    """Every gallery that has pairs. source: where the pictures are, None for none shown."""
    chosen = _chosen(scores, flipped, most)
    rows = np.unique(np.concatenate([each for _, _, _, _, each in chosen] or [np.zeros(0, np.int64)]))
    read = {each.row: each for each in worst_pairs.read_examples(scores, rows, reference)}
    cells = worst_pairs.sides(list(read.values()))
    folder = common_folder(cells)
    pictures = thumbnails(cells, source) if source is not None else {}
    _warn(pictures)
    return [
        {
            "id": name,
            "title": title,
            "about": about,
            "shown": f"{len(kept)} of {total:,}" if total > len(kept) else f"{total:,}",
            "folder": folder,
            "pictures": source is not None,
            "pairs": [_pair(read[row], scores, pictures, folder) for row in kept.tolist()],
        }
        for name, title, about, total, kept in chosen
        if len(kept) and read
    ]


def _warn(pictures: Mapping[str | None, Thumbnail]) -> None:
    """Say why where pictures were asked for and not one can be shown."""
    if pictures and not any(each.uri for each in pictures.values()):
        notes = Counter(each.note for each in pictures.values()).most_common()
        reasons = ", ".join(f"{note}: {count}" for note, count in notes)
        log.warning("the report shows no picture (%s); see --image-root", reasons)


def _chosen(scores: Scores, flipped: np.ndarray, most: int) -> list[tuple[str, str, str, int, np.ndarray]]:
    """Id, title, explanation, how many there are, and the rows shown."""
    everything = len(scores)
    accepts, rejects = (
        worst_pairs.false_accepts(scores, everything),
        worst_pairs.false_rejects(scores, everything),
    )
    chosen = [
        ("false-accepts", "Worst false accepts", "Two people, called the same; the surest first.", accepts),
        ("false-rejects", "Worst false rejects", "One person, called different; the surest first.", rejects),
        ("flipped", "Flipped against the reference", "The largest change first.", flipped),
    ]
    listed = [(name, title, about, len(rows), rows[:most]) for name, title, about, rows in chosen]
    near = worst_pairs.nearest(scores, most)
    listed.insert(
        2, ("nearest", "Nearest the threshold", "The closest calls, whatever their truth.", len(near), near)
    )
    for place, (reason, total) in enumerate(scores.failures().items()):
        title = f"Not scored: {reason}"
        listed.append((f"failed-{place}", title, "", total, worst_pairs.failed(scores, reason)[:most]))
    return listed


def common_folder(cells: Sequence[str | None]) -> str:
    """The folders that all paths start with, where this is long enough to be in the way; else nothing."""
    paths = [cell for cell in cells if cell]
    if len(paths) < 2:
        return ""
    shared = commonprefix(paths)  # noqa: RUF071  cut at a slash below
    folder = shared[: shared.rfind("/") + 1]
    return folder if len(folder) >= LONG else ""


def _pair(
    example: Example, scores: Scores, pictures: Mapping[str | None, Thumbnail], folder: str
) -> dict[str, Any]:
    scored = not math.isnan(example.probability)
    called = int(scores.calls[example.row])
    verdict = (
        "open"
        if example.truth == UNKNOWN or not scored
        else ("right" if called == example.truth else "wrong")
    )
    return {
        "row": example.row + 1,
        "scored": scored,
        "probability": score(example.probability),
        "before": score(example.before) if example.before is not None else None,
        "similarity": "" if math.isnan(example.similarity) else f"{example.similarity:.4f}",
        "truth": TRUTHS[example.truth],
        "called": TRUTHS[called],
        "verdict": verdict,
        "sides": _sides(example, pictures, folder),
    }


def _sides(
    example: Example, pictures: Mapping[str | None, Thumbnail], folder: str
) -> Sequence[dict[str, Any]]:
    sides = []
    for name, cell, error in zip("AB", example.cells, example.errors, strict=True):
        picture = pictures.get(cell, NO_IMAGE)
        shown = cell.removeprefix(folder) if cell else "(empty cell)"
        sides.append(
            {
                "name": name,
                "cell": shown,
                "path": cell or "",
                "error": error,
                "uri": picture.uri,
                "note": picture.note,
            }
        )
    return sides


def score(value: float) -> str:
    """A probability so that those near 0 and 1 can be told apart."""
    if math.isnan(value):
        return "none"
    if value > 0.999:
        return f"1 − {1 - value:.2g}" if value < 1 else "1"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.2g}"
