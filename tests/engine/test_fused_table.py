"""The tables of several backbones: what is usable, who made a score, and what an earlier run says."""

import numpy as np
import pyarrow as pa

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.fused_table import FusedTable
from batchverify.records import Reason, Skipped


def filled(count: int, dimension: int, failed: dict[int, Reason]) -> EmbeddingTable:
    table = EmbeddingTable(count, dimension=dimension)
    for index in range(count):
        if index in failed:
            table.fail(index, Skipped(failed[index]))
        else:
            table.put(index, np.full(dimension, index + 1, np.float16))
    return table


def test_a_pair_needs_one_backbone_with_both_sides():
    first, second = filled(4, 64, {1: Reason.NO_FACE}), filled(4, 96, {2: Reason.CRASHED, 3: Reason.NO_FACE})
    table = FusedTable([first, second])
    a, b = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 2])
    assert table.usable(a, b).tolist() == [True, True, True, False, False]
    assert table.makers(a, b, ["x", "y"]).to_pylist() == ["x+y", "y", "x", None, None]
    assert table.reasons(a).to_pylist() == [None, None, None, "no_face", "no_face"]
    assert [rows.shape[1] for rows, _ in table.vectors] == [64, 96]
    assert [known.tolist() for _, known in table.vectors] == [
        [True, False, True, True],
        [True, True, False, False],
    ]
    assert table.failed() == 0
    table.keep_common()
    assert first.codes.tolist() == second.codes.tolist() and (first.codes > 0).tolist() == [
        False,
        True,
        True,
        True,
    ]
    assert first.reasons(np.arange(4)).to_pylist() == [None, "no_face", "crashed", "no_face"]
    assert not first.vectors[1:].any() and not second.vectors[1:].any() and table.failed() == 3


def test_failures_of_files_are_restored_for_all_and_those_of_faces_for_the_first():
    tables = [EmbeddingTable(4), EmbeddingTable(4)]
    reasons = pa.array(["not_found", None, "no_face", "crashed"])
    FusedTable(tables).restore(np.arange(4), reasons)
    assert [table.codes.tolist() for table in tables] == [[1, -1, 6, 7], [1, -1, -1, -1]]
    assert tables[1].unknown(np.array([0, 3])).tolist() == [3]


def test_an_image_that_changed_between_two_backbones_is_unreadable():
    tables = [EmbeddingTable(3, keyed=True), EmbeddingTable(3, keyed=True), EmbeddingTable(3, keyed=True)]
    for number, own in enumerate(tables):
        for index in range(3):
            own.put(index, np.ones(512, np.float16))
            if (number, index) != (1, 2):
                own.see(index, bytes([1 + (index == 1 and number == 2)] * 32))
    table = FusedTable(tables)
    a, b = np.array([0, 0, 2]), np.array([2, 1, 1])
    assert table.usable(a, b).tolist() == [True, False, False]
    assert table.makers(a, b, ["x", "y", "z"]).to_pylist() == ["x+y+z", None, None]
    assert table.reasons(np.arange(3)).to_pylist() == [None, "unreadable", None]
