"""Why a label is a suspect, in plain words. Rows count from 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from batchverify.errors import redacted
from batchverify.evaluation.evidence import Evidence

# Rows that a reason lists.
LISTED = 4
SAYS = ("one person", "two people")


def reason(evidence: Evidence, place: int) -> str:
    """All that speaks against one label. place: in `evidence.rows`."""
    parts = (_itself, _names, _other_labels, _chain, _accusers, _score, _images)
    text = "; ".join(sentence for part in parts for sentence in part(evidence, place))
    return text or _least_sure(evidence, place)


def _least_sure(evidence: Evidence, place: int) -> str:
    """Of a label that no single pair disputes."""
    if evidence.against[place] > 0:
        return "the chains of pairs speak against the label"
    says = f"{SAYS[evidence.labels[place]]} {evidence.learned.margin[place]:.4f}"
    if evidence.called[place] != evidence.labels[place]:
        by = "the score" if not evidence.weighed else "what the other pairs say"
        return f"the verdict is the other one, but by {by} the label is likelier: {says}"
    return f"nothing speaks against it, but it is less sure than the rest: {says}"


def _itself(evidence: Evidence, place: int) -> Iterator[str]:
    if evidence.a[place] == evidence.b[place]:
        yield "both sides are one image, yet labelled different"


def _names(evidence: Evidence, place: int) -> Iterator[str]:
    a, b = (evidence.names[side[place]] for side in (evidence.a, evidence.b))
    if evidence.against_names[place]:
        texts = [str(evidence.people[int(each)]) for each in (a, b)]
        if a == b:
            yield f"labelled different, but both images are named {texts[0]}"
        else:
            yield f"labelled same, but the images are named {texts[0]} and {texts[1]}"
    if evidence.misnamed[place]:
        yield "other rows have another name for one of the images"


def _other_labels(evidence: Evidence, place: int) -> Iterator[str]:
    """The same two images with the other label."""
    edges = evidence.graph.edges
    edge = edges.of_row[place]
    # Edges are sorted by images, then label.
    for other in (edge - 1, edge + 1):
        if 0 <= other < len(edges.a) and (edges.a[other], edges.b[other]) == (edges.a[edge], edges.b[edge]):
            rows = evidence.rows[edges.of_row == other]
            yield f"{listed(rows)} {verb(rows, 'labels', 'label')} the same two images {name(edges.labels[other])}"


def _chain(evidence: Evidence, place: int) -> Iterator[str]:
    """Pairs labelled same that make one person of a pair labelled different."""
    graph = evidence.graph
    edge = graph.edges.of_row[place]
    if evidence.labels[place] == 1 and graph.against[edge] > 0:
        chain = graph.chain(edge)
        if len(chain) > 1:
            yield f"{listed(_rows(evidence, chain))}, labelled same, join both images as one person"


def _accusers(evidence: Evidence, place: int) -> Iterator[str]:
    """Pairs labelled different that this link of a chain contradicts."""
    graph = evidence.graph
    edge = graph.edges.of_row[place]
    if evidence.labels[place] == 0 and graph.against[edge] > -graph.edges.weights[edge]:
        rows = _rows(evidence, graph.accusers(edge))
        if len(rows):
            yield f"it makes one person of images that {listed(rows)} {verb(rows, 'calls', 'call')} two people"


def _score(evidence: Evidence, place: int) -> Iterator[str]:
    learned = evidence.learned
    if learned.margin[place] >= 0.5:
        return
    says = f"{SAYS[1 - evidence.labels[place]]} ({1 - learned.margin[place]:.4f})"
    couples, sure = evidence.couples(place), learned.off_diagonal[place]
    if not evidence.weighed:
        yield (f"the score is as sure of {says} as for pairs labelled so" if sure else f"the score leans to {says}")
    elif couples == 1:
        by = "judged by the other pairs, it"
        yield f"{by} is as surely {says} as pairs labelled so" if sure else f"{by} leans to {says}"
    else:
        by = f"all {couples:,} couples of images from both sides together"
        yield f"{by} are as surely {says} as pairs labelled so" if sure else f"{by} lean to {says}"


def _images(evidence: Evidence, place: int) -> Iterator[str]:
    for image in dict.fromkeys((int(evidence.a[place]), int(evidence.b[place]))):
        if evidence.odd[image]:
            pairs, disputed = (counts[image] for counts in evidence.same)
            cell = redacted(str(evidence.images[image]))
            yield f"the scores are against {disputed:,} of {pairs:,} labels same of {cell}: perhaps a wrong picture"


def _rows(evidence: Evidence, edges: np.ndarray) -> np.ndarray:
    """The first row of each edge, in the table."""
    return evidence.rows[evidence.graph.edges.row[edges]]


def listed(rows: Sequence[int] | np.ndarray) -> str:
    """Rows of a table, from 0, as a text of numbers from 1."""
    texts = [f"{int(row) + 1:,}" for row in rows[:LISTED]]
    if len(rows) > LISTED:
        return f"rows {', '.join(texts)} and {len(rows) - LISTED:,} more"
    return f"row {texts[0]}" if len(texts) == 1 else f"rows {', '.join(texts[:-1])} and {texts[-1]}"


def verb(rows: Sequence[int] | np.ndarray, one: str, several: str) -> str:
    """The form of a verb that goes with the rows."""
    return one if len(rows) == 1 else several


def name(label: int) -> str:
    """A label in words."""
    return "different" if label else "same"
