"""The spanning forest beside plain Python: which edges, which sums across cuts, which minima along paths."""

import numpy as np
import pytest

from batchverify.evaluation.forest import Forest


def kruskal(edges: list[tuple[int, int]], weights: np.ndarray, nodes: int) -> set[int]:
    """The numbers of the edges of the maximum spanning forest."""
    group = list(range(nodes))
    kept = set()
    for number in np.argsort(-weights, kind="stable").tolist():
        a, b = (group[end] for end in edges[number])
        if a != b:
            kept.add(number)
            group = [a if each == b else each for each in group]
    return kept


def way(edges: list[tuple[int, int]], kept: set[int], start: int, end: int) -> list[int]:
    """The numbers of the edges of the forest between two nodes."""
    ways: dict[int, list[int]] = {start: []}
    open_nodes = [start]
    while end not in ways:
        node = open_nodes.pop()
        for number in kept:
            if node in edges[number]:
                (other,) = set(edges[number]) - {node}
                if other not in ways:
                    ways[other] = [*ways[node], number]
                    open_nodes.append(other)
    return ways[end]


def drawn(seed: int) -> tuple[list[tuple[int, int]], np.ndarray, int]:
    rng = np.random.default_rng(seed)
    nodes, count = int(rng.integers(2, 30)), int(rng.integers(1, 60))
    edges = sorted({tuple(sorted(rng.choice(nodes, 2, replace=False).tolist())) for _ in range(count)})
    return edges, rng.normal(size=len(edges)), nodes


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_plain_python(seed):
    edges, weights, nodes = drawn(seed)
    a, b = np.array(edges).T
    forest = Forest.of(a, b, weights, nodes)
    kept = kruskal(edges, weights, nodes)
    assert set(forest.edge[forest.edge >= 0].tolist()) == kept
    others = np.array([number for number in range(len(edges)) if number not in kept], int)
    ways = [way(edges, kept, *edges[number]) for number in others]
    crossing = forest.crossing(a[others], b[others], weights[others])
    for node in np.flatnonzero(forest.edge >= 0).tolist():
        across = [weights[other] for other, links in zip(others, ways, strict=True) if forest.edge[node] in links]
        assert crossing[node] == pytest.approx(sum(across))
    values = np.append(weights[forest.edge[:-1]], 0)
    lowest, link, _ = forest.climb(values, a[others], b[others])
    assert lowest == pytest.approx([weights[links].min() for links in ways])
    assert forest.edge[link].tolist() == [links[int(weights[links].argmin())] for links in ways]
    for other, links in zip(others.tolist(), ways, strict=True):
        assert forest.edge[forest.path(*edges[other])].tolist() == links


def test_trees_start_at_the_nodes_that_come_first():
    a, b = np.array([0, 1, 3]), np.array([1, 2, 4])
    first = np.array([False, False, True, False, False])
    forest = Forest.of(a, b, np.ones(3), 5, first)
    assert forest.parent.tolist() == [1, 2, 5, 5, 3, 5]
    assert forest.depth.tolist() == [3, 2, 1, 1, 2, 0]


def test_a_chain_of_a_hundred_thousand_is_climbed():
    count = 100_000
    forest = Forest.of(np.arange(count - 1), np.arange(1, count), np.ones(count - 1), count)
    assert forest.crossing(np.array([0]), np.array([count - 1]), np.array([2.0]))[1:-1].tolist() == [2.0] * (
        count - 1
    )


def test_no_edge_at_all():
    nothing = np.zeros(0, np.int64)
    forest = Forest.of(nothing, nothing, np.zeros(0), 3)
    assert forest.parent.tolist() == [3, 3, 3, 3]
    assert forest.climb(np.zeros(4), np.array([1]), np.array([1]))[0].tolist() == [np.inf]
