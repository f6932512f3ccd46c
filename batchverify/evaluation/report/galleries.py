"""The galleries of the report: pairs with their faces, scores and paths, as the page shows them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import numpy as np

from batchverify.errors import redacted
from batchverify.evaluation import worst_pairs
from batchverify.evaluation.report.thumbnails import ImageSource, Thumbnail, thumbnails
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.evaluation.suspects import Suspects
from batchverify.options import MOST_EXAMPLES

log = logging.getLogger(__name__)

TRUTHS = {0: "same person", 1: "two people", UNKNOWN: "unknown"}
# A common folder of all paths is printed once if it has at least this many characters.
LONG = 16
# The columns with the reasons of the two sides; other programs may leave them out.
ERRORS = ("error_a", "error_b")
NO_IMAGE = Thumbnail(None, "no image shown")


@dataclass(frozen=True)
class Gallery:
    """Pairs of one kind. total: how many there are. rows: those that are shown. cards: of these, see `_card`.

    folder: the common folder of all paths. reasons: why each row is here, in words; empty where the title says it.
    """

    id: str
    title: str
    about: str
    total: int
    rows: np.ndarray
    cards: Sequence[dict[str, Any]] = ()
    folder: str = ""
    has_images: bool = False
    reasons: Sequence[str] = ()


def galleries(
    scores: Scores,
    reference: Scores | None,
    flipped: np.ndarray,
    *,
    most: int,
    source: ImageSource | None,
    suspects: Suspects | None = None,
) -> list[Gallery]:
    """Every gallery with pairs; none without image columns. source: where the images are, None to show none."""
    selected = [each for each in _select(scores, flipped, most, suspects) if len(each.rows)]
    names, sides = scores.file.schema.names, scores.file.sides
    if not selected or not set(sides) <= set(names):
        return []
    rows = np.unique(np.concatenate([each.rows for each in selected]))
    read = scores.file.take(rows, [*sides, *(name for name in ERRORS if name in names)])
    paths = list(dict.fromkeys(cells[side] for cells in read for side in sides))
    folder = common_folder(paths)
    images = thumbnails(paths, source) if source is not None else {}
    _warn(images)
    cards = {
        row: _card(scores, reference, row, cells, images, folder)
        for row, cells in zip(rows.tolist(), read, strict=True)
    }
    has_images = source is not None
    return [replace(each, cards=_cards(each, cards), folder=folder, has_images=has_images) for each in selected]


def common_folder(cells: Sequence[str | None]) -> str:
    """The folder that all paths start with if it is long, else an empty text."""
    paths = [cell for cell in cells if cell]
    if len(paths) < 2:
        return ""
    shared = commonprefix(paths)  # noqa: RUF071  cut at a slash below
    folder = shared[: shared.rfind("/") + 1]
    return folder if len(folder) >= LONG else ""


def score(value: float) -> str:
    """A probability with enough digits to tell values near 0 and 1 apart."""
    if math.isnan(value):
        return "none"
    if value > 0.999:
        return f"1 − {1 - value:.2g}" if value < 1 else "1"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.2g}"


def _cards(gallery: Gallery, cards: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The cards of a gallery's rows, with its reasons."""
    reasons = dict(zip(gallery.rows.tolist(), gallery.reasons, strict=False))
    return [cards[row] | {"reason": reasons.get(row)} for row in gallery.rows.tolist()]


def _select(scores: Scores, flipped: np.ndarray, most: int, suspects: Suspects | None) -> Iterator[Gallery]:
    """The galleries, still without cards."""
    if suspects is not None:
        about = "Labels that may be wrong, the most suspect first, each with its reason."
        rows, reasons = suspects.rows, suspects.reasons
        yield Gallery("suspects", "Suspect labels", about, len(rows), rows[:MOST_EXAMPLES], reasons=reasons)
    accepts, rejects = worst_pairs.false_accepts(scores), worst_pairs.false_rejects(scores)
    near = worst_pairs.nearest(scores)[:most]
    about = "Two people called the same; clearest errors first."
    yield Gallery("false-accepts", "Worst false accepts", about, len(accepts), accepts[:most])
    about = "One person called different; clearest errors first."
    yield Gallery("false-rejects", "Worst false rejects", about, len(rejects), rejects[:most])
    about = "The closest calls, whatever their truth."
    yield Gallery("nearest", "Nearest the threshold", about, len(near), near)
    about = "Other verdicts than in the reference; largest change first."
    yield Gallery("flipped", "Flipped pairs", about, len(flipped), flipped[:most])
    for index, (reason, total) in enumerate(scores.failures().items()):
        rows = worst_pairs.failed(scores, reason)[:most]
        yield Gallery(f"failed-{index}", f"Not scored: {reason}", "", total, rows)


def _warn(images: Mapping[str | None, Thumbnail]) -> None:
    """Say why if images are wanted and none can be shown."""
    if images and not any(each.uri for each in images.values()):
        notes = Counter(each.note for each in images.values()).most_common()
        reasons = ", ".join(f"{note}: {count}" for note, count in notes)
        log.warning("the report shows no images (%s); see --image-root", reasons)


def _card(
    scores: Scores,
    reference: Scores | None,
    row: int,
    cells: Mapping[str, Any],
    images: Mapping[str | None, Thumbnail],
    folder: str,
) -> dict[str, Any]:
    """A pair for the page. row: from 1. before: the reference's probability. verdict: right, wrong or open."""
    truth, called = int(scores.truth[row]), int(scores.calls[row])
    probability = float(scores.probability[row])
    scored = not math.isnan(probability)
    similarity = scores.similarity[row] if scores.similarity is not None else math.nan
    sides = [
        _side(name, cells[side], cells.get(error), images, folder)
        for name, side, error in zip("AB", scores.file.sides, ERRORS, strict=True)
    ]
    return {
        "row": row + 1,
        "scored": scored,
        "probability": score(probability),
        "before": score(float(reference.probability[row])) if reference is not None else None,
        "similarity": "" if math.isnan(similarity) else f"{similarity:.4f}",
        "truth": TRUTHS[truth],
        "called": TRUTHS[called],
        "verdict": "open" if not scored or truth == UNKNOWN else "right" if called == truth else "wrong",
        "sides": sides,
    }


def _side(
    name: str, cell: str | None, error: str | None, images: Mapping[str | None, Thumbnail], folder: str
) -> dict[str, Any]:
    """One image of a pair. cell: the path as shown. path: the whole path, empty for an empty cell."""
    shown = redacted(cell.removeprefix(folder)) if cell else "(empty cell)"
    image = images.get(cell, NO_IMAGE)
    return {"name": name, "cell": shown, "path": redacted(cell or ""), "error": error, **vars(image)}
