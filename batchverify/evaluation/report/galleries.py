"""The galleries of the report: pairs with their faces, scores and paths, as the page shows them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np

from batchverify.errors import redacted
from batchverify.evaluation import worst_pairs
from batchverify.evaluation.report.thumbnails import ImageSource, Thumbnail, thumbnails
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.evaluation.worst_pairs import Example

log = logging.getLogger(__name__)

TRUTHS = {0: "same person", 1: "two people", UNKNOWN: "unknown"}
# A common folder of all paths is printed once if it has at least this many characters.
LONG = 16
NO_IMAGE = Thumbnail(None, "no image shown")


@dataclass(frozen=True)
class Side:
    """One image of a pair. cell: the path as shown. path: the whole path, empty for an empty cell."""

    name: str
    cell: str
    path: str
    error: str | None
    uri: str | None
    note: str


@dataclass(frozen=True)
class Card:
    """One pair. row: counted from 1. before: the reference's probability. verdict: right, wrong or open."""

    row: int
    scored: bool
    probability: str
    before: str | None
    similarity: str
    truth: str
    called: str
    verdict: str
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Gallery:
    """Some pairs. shown: how many of how many. folder: the common folder of all paths."""

    id: str
    title: str
    about: str
    shown: str
    folder: str
    has_images: bool
    cards: tuple[Card, ...]


def galleries(
    scores: Scores, reference: Scores | None, flipped: np.ndarray, *, most: int, source: ImageSource | None
) -> list[Gallery]:
    """Every gallery with pairs. source: where the images are, None to show none."""
    selections = [each for each in _select(scores, flipped, most) if len(each.rows)]
    rows = np.unique(np.concatenate([each.rows for each in selections] or [np.zeros(0, np.int64)]))
    examples = {each.row: each for each in worst_pairs.read_examples(scores, rows, reference)}
    if not examples:
        return []
    cells = worst_pairs.sides(list(examples.values()))
    folder = common_folder(cells)
    images = thumbnails(cells, source) if source is not None else {}
    _warn(images)
    return [
        Gallery(
            id=each.id,
            title=each.title,
            about=each.about,
            shown=f"{len(each.rows)} of {each.total:,}" if each.total > len(each.rows) else f"{each.total:,}",
            folder=folder,
            has_images=source is not None,
            cards=tuple(_card(examples[row], scores, images, folder) for row in each.rows.tolist()),
        )
        for each in selections
    ]


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


@dataclass(frozen=True)
class _Selection:
    """The rows of a gallery. total: how many there are of the kind, shown or not."""

    id: str
    title: str
    about: str
    total: int
    rows: np.ndarray


def _select(scores: Scores, flipped: np.ndarray, most: int) -> list[_Selection]:
    everything = len(scores)
    accepts = worst_pairs.false_accepts(scores, everything)
    rejects = worst_pairs.false_rejects(scores, everything)
    near = worst_pairs.nearest(scores, most)
    kinds = [
        (
            "false-accepts",
            "Worst false accepts",
            "Two people called the same; clearest errors first.",
            accepts,
        ),
        (
            "false-rejects",
            "Worst false rejects",
            "One person called different; clearest errors first.",
            rejects,
        ),
        ("nearest", "Nearest the threshold", "The closest calls, whatever their truth.", near),
        ("flipped", "Flipped pairs", "Other verdicts than in the reference; largest change first.", flipped),
    ]
    selections = [
        _Selection(name, title, about, len(rows), rows[:most]) for name, title, about, rows in kinds
    ]
    for index, (reason, total) in enumerate(scores.failures().items()):
        rows = worst_pairs.failed(scores, reason)[:most]
        selections.append(_Selection(f"failed-{index}", f"Not scored: {reason}", "", total, rows))
    return selections


def _warn(images: Mapping[str | None, Thumbnail]) -> None:
    """Say why if images are wanted and none can be shown."""
    if images and not any(each.uri for each in images.values()):
        notes = Counter(each.note for each in images.values()).most_common()
        reasons = ", ".join(f"{note}: {count}" for note, count in notes)
        log.warning("the report shows no images (%s); see --image-root", reasons)


def _card(example: Example, scores: Scores, images: Mapping[str | None, Thumbnail], folder: str) -> Card:
    scored = not math.isnan(example.probability)
    called = int(scores.calls[example.row])
    verdict = "right" if called == example.truth else "wrong"
    a, b = (
        _side(name, cell, error, images.get(cell, NO_IMAGE), folder)
        for name, cell, error in zip("AB", example.cells, example.errors, strict=True)
    )
    return Card(
        row=example.row + 1,
        scored=scored,
        probability=score(example.probability),
        before=score(example.before) if example.before is not None else None,
        similarity="" if math.isnan(example.similarity) else f"{example.similarity:.4f}",
        truth=TRUTHS[example.truth],
        called=TRUTHS[called],
        verdict=verdict if scored and example.truth != UNKNOWN else "open",
        sides=(a, b),
    )


def _side(name: str, cell: str | None, error: str | None, image: Thumbnail, folder: str) -> Side:
    shown = redacted(cell.removeprefix(folder)) if cell else "(empty cell)"
    return Side(name, shown, redacted(cell or ""), error, image.uri, image.note)
