"""The evidence against the labels of a scored table: its scores, its chains of pairs, its names of people."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import ManifestError
from batchverify.evaluation.confident_learning import ConfidentLearning
from batchverify.evaluation.image_vectors import image_vectors
from batchverify.evaluation.out_of_fold import FEWEST, out_of_fold
from batchverify.evaluation.pair_graph import UNNAMED, Edges, PairGraph
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.scores import PERSONS, UNKNOWN, Scores
from batchverify.evaluation.surroundings import Surroundings
from batchverify.manifest.columns import cell_names

# A label that contradicts the names of its own row is more suspect than any that the scores alone speak against.
NAMED = 100.0


@dataclass(frozen=True)
class SecondOpinion:
    """Another run of the same pairs in order. source: of its images and vectors; None for its scores alone."""

    scores: Scores
    source: ImageSource | None

    def features(self, rows: np.ndarray, labels: np.ndarray, images: pa.Array, edges: Edges) -> list[np.ndarray]:
        """(E,) columns. A pair that this run did not score says nothing."""
        probability = self.scores.probability[rows]
        known = ~np.isnan(probability)
        log_odds = np.zeros(len(rows))
        if known.any():
            log_odds[known] = ConfidentLearning.of(probability[known], labels[known]).log_odds
        around, _ = _around(self.scores, images, self.source, edges)
        return _features(edges, log_odds, around)


@dataclass(frozen=True)
class Evidence:
    """What speaks against the labels of the M pairs that have a label and a score.

    rows: (M,) their rows in the table, from 0. labels: (M,) 0 or 1. called: (M,) the verdicts, 0 or 1. a, b: (M,)
    numbers of their images. images: (V,) the cells. names: (V,) the name of each image as a number in `people`,
    `UNNAMED` for none. misnamed: (M,) bool, the row has another name for an image than most rows. around: what the
    images around both sides say, if their vectors are known. without_vectors: why they are not. weighed: the labels
    of other pairs decided how much scores and vectors count.
    """

    rows: np.ndarray
    labels: np.ndarray
    called: np.ndarray
    a: np.ndarray
    b: np.ndarray
    images: pa.Array
    names: np.ndarray
    people: pa.Array
    misnamed: np.ndarray
    learned: ConfidentLearning
    graph: PairGraph
    around: Surroundings | None
    without_vectors: str
    weighed: bool

    @classmethod
    def of(cls, scores: Scores, source: ImageSource | None = None, second: SecondOpinion | None = None) -> Evidence:
        """source: of the images and their vectors; None for the scores alone. second: another run of these pairs.

        Raises `ManifestError` for a table without images, and if no pair has both a label and a score.
        """
        usable = scores.scored & (scores.truth != UNKNOWN)
        cells = scores.file.table(scores.file.sides)
        for side in cells.columns:
            # Other programs may write a score beside a blank cell.
            usable &= pc.not_equal(side.cast(pa.large_string()), "").fill_null(False).to_numpy()
        rows = np.flatnonzero(usable)
        if not len(rows):
            raise ManifestError(
                f"{scores.file.name}: no pair has both a label and a score, so no label can be a suspect; --truth "
                "names a manifest with labels"
            )
        labels = scores.truth[rows].astype(np.int64)
        (a, b), images = _numbered(cells.take(pa.array(rows)))
        names, people, misnamed = _names(scores, rows, a, b, len(images))
        learned, edges = _learned(scores.probability[rows], labels, a, b, len(images))
        around, without = _around(scores, images, source, edges)
        features = _features(edges, learned.log_odds, around)
        if second is not None:
            features += second.features(rows, labels, images, edges)
        # The score alone has nothing to be weighed with.
        refined = out_of_fold(np.column_stack(features), edges.labels) if len(features) > 1 else None
        if around is not None and refined is None:
            around, without = None, f"fewer than {FEWEST} pairs have one of the labels"
        if refined is not None:
            learned, edges = _learned(refined[edges.of_row], labels, a, b, len(images))
        graph = PairGraph.of(edges, len(images), names, learned.trust)
        called, weighed = scores.calls[rows].astype(np.int64), refined is not None
        found = (rows, labels, called, a, b, images, names, people, misnamed, learned, graph)
        return cls(*found, around, without, weighed)

    @cached_property
    def against_names(self) -> np.ndarray:
        """(M,) bool: both images have a name, and the label says otherwise than the two names."""
        a, b = self.names[self.a], self.names[self.b]
        return (a != UNNAMED) & (b != UNNAMED) & ((a != b) != (self.labels == 1))

    @cached_property
    def against(self) -> np.ndarray:
        """(M,) log-odds that the label is wrong."""
        return self.graph.against[self.graph.edges.of_row] + NAMED * self.against_names

    def couples(self, place: int) -> int:
        """How many couples of images were compared to judge a label; 1 for the pair's own score."""
        return 1 if self.around is None else int(self.around.couples[self.graph.edges.of_row[place]])

    @cached_property
    def same(self) -> tuple[np.ndarray, np.ndarray]:
        """(V,) the distinct pairs labelled same of each image, and how many of these labels the scores dispute."""
        return self.graph.edges.same(len(self.images))

    @cached_property
    def odd(self) -> np.ndarray:
        """(V,) bool: images that are suspect as a whole."""
        return self.graph.edges.odd(len(self.images))

    @cached_property
    def suspect(self) -> np.ndarray:
        """(M,) bool: labels that anything speaks against."""
        return (self.against > 0) | (self.learned.margin < 0.5)

    def ranked(self) -> np.ndarray:
        """Places in `rows`: the labels that anything speaks against, the most suspect first, then all others."""
        places = np.arange(len(self.rows))
        return np.lexsort((places, self.learned.margin, -self.against, ~self.suspect))


def _learned(
    probability: np.ndarray, labels: np.ndarray, a: np.ndarray, b: np.ndarray, images: int
) -> tuple[ConfidentLearning, Edges]:
    """What (M,) probabilities of two people say about (M,) labels, and the distinct pairs with that."""
    learned = ConfidentLearning.of(probability, labels)
    return learned, Edges.of(a, b, labels, learned.log_odds, learned.trust, images)


def _around(
    scores: Scores, images: pa.Array, source: ImageSource | None, edges: Edges
) -> tuple[Surroundings | None, str]:
    """What the images around both sides of each edge say, or why that is not known."""
    if source is None:
        return None, "images are not read"
    vectors, without = image_vectors(images.to_pylist(), source, scores.file.record.get("embedding"))
    return (Surroundings.of(edges, vectors) if vectors is not None else None), without


def _features(edges: Edges, log_odds: np.ndarray, around: Surroundings | None) -> list[np.ndarray]:
    """(E,) columns. log_odds: (M,) of two people, of each row."""
    own = np.bincount(edges.of_row, log_odds) / np.bincount(edges.of_row)
    return [own, *(around.columns() if around is not None else ())]


def _numbered(table: pa.Table) -> tuple[tuple[np.ndarray, np.ndarray], pa.Array]:
    """The cells of two columns as numbers, and the distinct cells."""
    chunks = [chunk.cast(pa.large_string()) for side in table.columns for chunk in side.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).combine_chunks().dictionary_encode()
    numbers = encoded.indices.fill_null(UNNAMED).to_numpy().astype(np.int64)
    a, b = np.split(numbers, 2)
    return (a, b), encoded.dictionary


def _names(
    scores: Scores, rows: np.ndarray, a: np.ndarray, b: np.ndarray, images: int
) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """(V,) the commonest name of each image, the names, and (M,) which rows have another for one of their images."""
    if not set(PERSONS) <= set(scores.file.schema.names):
        return np.full(images, UNNAMED), pa.array([], pa.large_string()), np.zeros(len(rows), np.bool_)
    cells = scores.file.table(PERSONS).take(pa.array(rows))
    (person_a, person_b), people = _numbered(pa.table([cell_names(side) for side in cells.columns], PERSONS))
    image, name = np.concatenate([a, b]), np.concatenate([person_a, person_b])
    known = name != UNNAMED
    keys, counts = np.unique(image[known] * (len(people) + 1) + name[known], return_counts=True)
    of_image, of_name = np.divmod(keys, len(people) + 1)
    names = np.full(images, UNNAMED)
    # Of equally common names the last written stays: that which appears first.
    order = np.lexsort((-of_name, counts))
    names[of_image[order]] = of_name[order]
    differs = known & (names[image] != name)
    return names, people, differs[: len(rows)] | differs[len(rows) :]
