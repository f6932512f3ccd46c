"""Labels that are probably wrong: found, ranked, and written as a manifest for review."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchverify.errors import UsageError, redacted
from batchverify.evaluation.document import SuspectImage, SuspectsDocument
from batchverify.evaluation.evidence import Evidence, SecondOpinion
from batchverify.evaluation.reasons import reason
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.evaluation.worst_pairs import check_target, review_table
from batchverify.storage.location import Location

OPTION = "--suspects"
# Log-odds beyond this are a likelihood of 0 or 1.
MOST = 100.0
# Images that the document lists, and the terminal.
LISTED, SHOWN_IMAGES = 100, 5


@dataclass(frozen=True)
class Suspects:
    """S labels, the most suspect first.

    rows: (S,) of the table. likelihood: (S,) float32, that the label is wrong, from 0 to 1. reasons: why, in words.
    """

    rows: np.ndarray
    likelihood: np.ndarray
    reasons: Sequence[str]
    document: SuspectsDocument


def find_suspects(
    scores: Scores, most: int, source: ImageSource | None = None, second: SecondOpinion | None = None
) -> Suspects:
    """At most `most` suspect labels. source: of the images and their vectors; None for the scores alone.

    second: another run of the same pairs.

    Raises `ManifestError` if no pair has a label and a score.
    """
    evidence = Evidence.of(scores, source, second)
    chosen = evidence.ranked()[:most]
    reasons = [reason(evidence, place) for place in chosen.tolist()]
    likelihood = (1 / (1 + np.exp(-np.clip(evidence.against[chosen], -MOST, MOST)))).astype(np.float32)
    document = _document(scores, evidence, len(chosen), second=second is not None and evidence.weighed)
    return Suspects(evidence.rows[chosen], likelihood, reasons, document)


def _document(scores: Scores, evidence: Evidence, listed: int, *, second: bool) -> SuspectsDocument:
    learned, graph = evidence.learned, evidence.graph
    off = learned.off_diagonal
    return {
        "labels": len(evidence.rows),
        "not_scored": int((~scores.scored & (scores.truth != UNKNOWN)).sum()),
        "vectors": len(evidence.images) if evidence.around is not None else None,
        "without_vectors": evidence.without_vectors or None,
        "second_opinion": second,
        "found": int(evidence.suspect.sum()),
        "listed": listed,
        "contradictions": len(graph.contradictions),
        "against_names": int(evidence.against_names.sum()),
        "thresholds": {"same": learned.thresholds[0], "different": learned.thresholds[1]},
        "off_diagonal": {
            name: int(off[evidence.labels == label].sum()) for label, name in enumerate(("same", "different"))
        },
        "images": _images(evidence),
    }


def _images(evidence: Evidence) -> list[SuspectImage]:
    """The images that are suspect as a whole, those with most disputed labels first."""
    pairs, disputed = evidence.same
    images = np.flatnonzero(evidence.odd)
    images = images[np.argsort(-disputed[images], kind="stable")][:LISTED]
    return [
        {
            "image": redacted(str(evidence.images[image])),
            "disputed": int(disputed[image]),
            "pairs": int(pairs[image]),
        }
        for image in images.tolist()
    ]


def suspect_lines(found: SuspectsDocument | None) -> Iterator[tuple[str, str]]:
    """What the table on the terminal says: nothing without suspects."""
    if found is None:
        return
    second = ", and by the reference run" if found["second_opinion"] else ""
    yield "suspect labels", f"{found['listed']:,} written; something speaks against {found['found']:,}"
    if found["vectors"] is not None:
        yield "", f"judged by the scores and the vectors of {found['vectors']:,} images{second}"
    else:
        yield "", f"judged by the scores{second}, without vectors: {found['without_vectors']}"
    off = sum(found["off_diagonal"].values())
    yield "", f"{off:,} are as surely of the other kind as pairs labelled so"
    yield "", f"{found['contradictions']:,} contradict a chain, {found['against_names']:,} the names"
    if left := found["not_scored"]:
        yield "", f"{left:,} labels without a score are left out"
    for each in found["images"][:SHOWN_IMAGES]:
        counts = f"the scores are against {each['disputed']:,} of its {each['pairs']:,} labels same"
        yield "suspect image", f"{each['image']}: {counts}"


def check_suspects_target(path: str, inputs: Sequence[str]) -> Location:
    """Where the suspects go. Raises `UsageError` for another format, an input or a file that exists."""
    target = check_target(path, inputs, option=OPTION)
    try:
        is_new = target.kind() == "absent"
    except OSError as exc:
        raise UsageError(f"{path}: {OPTION} cannot write there: {exc}") from exc
    # A reviewer may have filled it in.
    if not is_new:
        raise UsageError(f"{path}: {OPTION} writes a new file, and this one exists; remove it or name another")
    return target


def suspects_table(scores: Scores, suspects: Suspects, target: Location, source: ImageSource) -> pa.Table:
    """The suspects as a manifest that `train` and `score` read, with `rank`, `row`, `suspicion` and `reason`.

    The scores have names of their own (`run_probability`, `run_similarity`), because `score` appends `probability`.
    """
    rows = suspects.rows
    table = review_table(scores, rows, target, source)
    names = ["run_probability" if name == "probability" else name for name in table.column_names]
    table = table.rename_columns(names)
    if scores.similarity is not None:
        table = table.append_column("run_similarity", pa.array(scores.similarity[rows]))
    added = {
        "rank": pa.array(np.arange(1, len(rows) + 1, dtype=np.int32)),
        "row": pa.array(rows + 1, pa.int64()),
        "suspicion": pa.array(suspects.likelihood),
        "reason": pa.array(suspects.reasons, pa.string()),
    }
    for name, column in added.items():
        table = table.append_column(name, column)
    return table
