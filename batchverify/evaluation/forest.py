"""Chains of pairs: a maximum spanning forest, sums over its cuts and minima along its paths, in near-linear time.

Everything works on whole arrays by pointer doubling: one round for each power of two up to the depth of the trees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

NO_EDGE = -1


@dataclass(frozen=True)
class Forest:
    """Trees over V nodes, all below one more node, the root V, which belongs to none of them.

    parent: (V + 1,) int64; a node of a tree stands for the link to its parent. edge: (V + 1,) int64, the number of
    the edge that this link is, -1 where the parent is the root. tree: (V,) int32, the same for nodes of one tree.
    """

    parent: np.ndarray
    edge: np.ndarray
    tree: np.ndarray

    @classmethod
    def of(
        cls, a: np.ndarray, b: np.ndarray, weights: np.ndarray, nodes: int, first: np.ndarray | None = None
    ) -> Forest:
        """The maximum spanning forest. a, b: (E,) ends of distinct edges, none from a node to itself.

        first: (V,) bool, the nodes that a tree starts at if it has any.
        """
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

        order = np.argsort(-weights, kind="stable")
        # The cost of an edge is its place in the order, from 1: all differ, and the tree's entries name the edges.
        costs = np.empty(len(a))
        costs[order] = np.arange(1, len(a) + 1)
        chosen = minimum_spanning_tree(coo_matrix((costs, (a, b)), (nodes, nodes)).tocsr()).tocoo()
        _, tree = connected_components(chosen, directed=False)
        ordered = np.arange(nodes) if first is None else np.argsort(~first, kind="stable")
        tops = ordered[np.unique(tree[ordered], return_index=True)[1]]
        rows = np.concatenate([chosen.row, np.full(len(tops), nodes)])
        columns = np.concatenate([chosen.col, tops])
        whole = coo_matrix((np.ones(len(rows)), (rows, columns)), (nodes + 1, nodes + 1)).tocsr()
        parent = breadth_first_order(whole, nodes, directed=False)[1].astype(np.int64)
        parent[nodes] = nodes
        edge = np.full(nodes + 1, NO_EDGE, np.int64)
        numbers = order[chosen.data.astype(np.int64) - 1]
        downwards = parent[chosen.col] == chosen.row
        edge[np.where(downwards, chosen.col, chosen.row)] = numbers
        return cls(parent, edge, tree)

    @cached_property
    def depth(self) -> np.ndarray:
        """(V + 1,) int64: links from each node up to the root."""
        jump, depth = self.parent, (self.parent != np.arange(len(self.parent))).astype(np.int64)
        while (depth[jump] > 0).any():
            depth, jump = depth + depth[jump], jump[jump]
        return depth

    @cached_property
    def jumps(self) -> list[np.ndarray]:
        """The ancestors 1, 2, 4 … links above each node."""
        jumps = [self.parent]
        while 2 ** len(jumps) <= self.depth.max(initial=0):
            jumps.append(jumps[-1][jumps[-1]])
        return jumps

    def below(self, values: np.ndarray) -> np.ndarray:
        """(V + 1,) float64: for each node the sum of the values (V + 1,) of itself and all nodes below it."""
        sums = values.astype(np.float64)
        top = len(sums) - 1
        for jump in self.jumps:
            sums[top] = 0
            sums = sums + np.bincount(jump, sums, len(sums))
        sums[top] = 0
        return sums

    def crossing(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(V + 1,) float64: for each link, the sum of the weights of the (Q,) edges that join its two sides.

        Both ends of an edge lie in one tree. Without the weights of the links themselves.
        """
        meet = self.climb(np.zeros(len(self.parent)), a, b)[2]
        count = len(self.parent)
        values = np.bincount(a, weights, count) + np.bincount(b, weights, count)
        return self.below(values - 2 * np.bincount(meet, weights, count))

    def climb(self, values: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each path between (Q,) nodes of one tree: its lowest value, the link that has it, and its top node.

        values: (V + 1,), of links. A path without a link has the value infinity.
        """
        path = _Paths(a, b)
        tables = self._tables(values)
        gap = self.depth[a] - self.depth[b]
        for level, table in enumerate(tables):
            path.lift(0, np.flatnonzero((gap > 0) & ((gap >> level) & 1 == 1)), *table)
            path.lift(1, np.flatnonzero((gap < 0) & ((-gap >> level) & 1 == 1)), *table)
        for jump, lowest, link in reversed(tables):
            apart = np.flatnonzero(jump[path.ends[0]] != jump[path.ends[1]])
            for side in (0, 1):
                path.lift(side, apart, jump, lowest, link)
        apart = np.flatnonzero(path.ends[0] != path.ends[1])
        for side in (0, 1):
            path.lift(side, apart, *tables[0])
        return path.lowest, path.link, path.ends[0]

    def _tables(self, values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each jump the lowest value on the way and the link that has it."""
        lowest, link = values.astype(np.float64), np.arange(len(values))
        lowest[-1] = np.inf
        tables = []
        for jump in self.jumps:
            tables.append((jump, lowest, link))
            further = lowest[jump]
            link = np.where(further < lowest, link[jump], link)
            lowest = np.minimum(lowest, further)
        return tables

    def path(self, a: int, b: int) -> list[int]:
        """The links between two nodes of one tree, from a to b."""
        ups, downs = [], []
        while a != b:
            if self.depth[a] >= self.depth[b]:
                ups.append(a)
                a = int(self.parent[a])
            else:
                downs.append(b)
                b = int(self.parent[b])
        return [*ups, *reversed(downs)]


class _Paths:
    """Paths that are climbed from both ends at once."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.ends = [a.astype(np.int64), b.astype(np.int64)]
        self.lowest = np.full(len(a), np.inf)
        self.link = np.full(len(a), NO_EDGE, np.int64)

    def lift(self, side: int, chosen: np.ndarray, jump: np.ndarray, lowest: np.ndarray, link: np.ndarray) -> None:
        """Move one end of the chosen paths up by a jump."""
        nodes = self.ends[side][chosen]
        lower = lowest[nodes] < self.lowest[chosen]
        self.link[chosen[lower]] = link[nodes[lower]]
        self.lowest[chosen] = np.minimum(self.lowest[chosen], lowest[nodes])
        self.ends[side][chosen] = jump[nodes]
