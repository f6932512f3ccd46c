"""Doubtful pairs against a slow loop over the rows."""

import numpy as np
import pytest

from batchverify.pairs import BLANK, Doubt, Doubts, doubtful_pairs


def slow(a, b, labels, most) -> Doubts:
    """The same by dictionaries, row by row."""
    ordered, unordered = {}, {}
    repeated, selves = {}, {}
    for row, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        key = tuple(sorted(pair))
        unordered.setdefault(key, []).append(row)
        ordered.setdefault(pair, []).append(row)
    counts = [len(rows) - 1 for rows in ordered.values()]
    for pair, rows in ordered.items():
        if len(rows) > 1:
            key = tuple(sorted(pair))
            case = (rows[1], rows[0])
            repeated[key] = min(repeated.get(key, case), case)
        if pair[0] == pair[1]:
            selves[pair] = (rows[0], rows[0])
    mirrored, torn = {}, {}
    for key, rows in unordered.items():
        first = {tuple(map(int, (a[row], b[row]))): row for row in reversed(rows)}
        if len(first) == 2:
            mirrored[key] = tuple(sorted(first.values(), reverse=True))
        truth = {int(labels[row]): row for row in reversed(rows) if labels[row] != BLANK}
        if len(truth) == 2:
            torn[key] = tuple(sorted(truth.values(), reverse=True))

    def cases(found) -> tuple:
        return tuple(found[key] for key in sorted(found, key=lambda key: unordered[key][0])[:most])

    return Doubts(
        Doubt(sum(counts), cases(repeated)),
        Doubt(len(mirrored), cases(mirrored)),
        Doubt(int((a == b).sum()), cases(selves)),
        Doubt(len(torn), cases(torn)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_a_slow_loop(seed):
    random = np.random.default_rng(seed)
    rows, images = int(random.integers(1, 300)), int(random.integers(1, 30))
    a, b = random.integers(0, images, (2, rows)).astype(np.int32)
    labels = random.integers(-1, 2, rows).astype(np.int8)
    assert doubtful_pairs(a, b, labels, most=3) == slow(a, b, labels, 3)


def test_large_indices_do_not_collide():
    top = 2**31 - 1
    a = np.array([0, 1, top, top - 1], np.int64)
    b = np.array([top, top, 1, top], np.int64)
    found = doubtful_pairs(a, b)
    assert found.mirrored == Doubt(1, ((2, 1),))
    assert (found.duplicates.count, found.selves.count, found.contradicting.count) == (0, 0, 0)


def test_no_rows_no_doubts():
    nothing = np.array([], np.int32)
    assert doubtful_pairs(nothing, nothing) == Doubts()
