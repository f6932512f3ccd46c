"""Comparisons across both sides of a pair against plain loops."""

import itertools

import numpy as np
import pytest

from batchverify.evaluation.pair_graph import Edges
from batchverify.evaluation.surroundings import Surroundings


def edges_of(pairs, images: int) -> Edges:
    a, b, labels = (np.array(each, np.int64) for each in zip(*pairs, strict=True))
    return Edges.of(a, b, labels, np.zeros(len(a)), 3.0, images)


def vectors_of(images: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(images, 5)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def slow(edges: Edges, vectors: np.ndarray):
    """Of each edge: cosine, mean across, couples, shared images."""
    joined: dict[int, set[int]] = {image: set() for image in range(len(vectors))}
    for a, b, label in zip(edges.a.tolist(), edges.b.tolist(), edges.labels.tolist(), strict=True):
        if label == 0 and a != b:
            joined[a].add(b)
            joined[b].add(a)
    for a, b in zip(edges.a.tolist(), edges.b.tolist(), strict=True):
        left, right = ({x, *joined[x]} - ({y} if x != y else set()) for x, y in ((a, b), (b, a)))
        couples = [(p, q) for p, q in itertools.product(left, right) if p != q]
        cosines = [float(vectors[p] @ vectors[q]) for p, q in couples]
        own = float(vectors[a] @ vectors[b])
        yield own, np.mean(cosines) if cosines else own, len(couples), len(joined[a] & joined[b])


def random_pairs(seed: int, images: int, count: int):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, images, (count, 2))
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    return [(a, b, int(label)) for (a, b), label in zip(drawn.tolist(), rng.integers(0, 2, len(drawn)), strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_sums_are_those_of_all_couples(seed):
    vectors, edges = vectors_of(14, seed), edges_of(random_pairs(seed, 14, 40), 14)
    found = Surroundings.of(edges, vectors, bite=7)
    cosine, mean, couples, shared = (np.array(each) for each in zip(*slow(edges, vectors), strict=True))
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert found.mean == pytest.approx(mean, abs=1e-5)
    assert found.couples.tolist() == couples.tolist()
    assert found.shared.tolist() == shared.tolist()


def test_a_label_does_not_vouch_for_itself():
    """Two crowds of three images; the one label that joins them does not make their images neighbours of it."""
    crowd = [(0, 1, 0), (1, 2, 0), (0, 2, 0), (3, 4, 0), (4, 5, 0), (3, 5, 0)]
    vectors = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)
    edges = edges_of([*crowd, (0, 3, 0)], 6)
    place = np.flatnonzero((edges.a == 0) & (edges.b == 3))[0]
    found = Surroundings.of(edges, vectors)
    assert (found.couples[place], found.mean[place], found.shared[place]) == (9, 0, 0)


def test_a_pair_of_one_image_has_its_own_cosine():
    found = Surroundings.of(edges_of([(0, 0, 0), (0, 1, 1)], 2), vectors_of(2))
    assert found.cosine[0] == pytest.approx(1) and found.mean[0] == pytest.approx(1)
    assert found.couples.tolist() == [0, 1]


def test_features_are_finite():
    edges = edges_of([*random_pairs(1, 9, 30), (2, 2, 0)], 9)
    columns = np.column_stack(Surroundings.of(edges, vectors_of(9)).columns())
    assert columns.shape == (len(edges.a), 7) and np.isfinite(columns).all()
