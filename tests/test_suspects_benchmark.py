"""The benchmark of suspects: which labels it turns round, and what it counts."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from benchmark_modules import benchmark_module
from score_tables import draw_columns, write_scores


@pytest.fixture
def benchmark():
    """The benchmark as a module."""
    with benchmark_module("suspects") as module:
        yield module


def test_a_share_of_the_scored_labels_is_turned_round(benchmark, tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(300))
    target = tmp_path / "flipped.parquet"
    rows = benchmark.flipped(scores, target, 0.1, 0, names=False)
    before, after = pq.read_table(scores), pq.read_table(target)
    differs = before["true_label"].to_numpy() != after["true_label"].to_numpy()
    assert np.flatnonzero(differs).tolist() == sorted(rows.tolist())
    assert len(rows) == round(0.1 * (300 - before["probability"].null_count))
    assert not before["probability"].take(rows).null_count
    assert set(before.column_names) - set(after.column_names) == {"person_a", "person_b"}


def test_with_names_every_turned_label_is_found(benchmark, tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(300))
    name, seed, count, *shares = benchmark.flipped_row("toy", scores, tmp_path, 0.1, 1)
    assert (name, seed, count) == ("toy", "1", str(round(0.1 * 284)))
    assert shares[0] == "1.000" and all(0.5 < float(share) <= 1 for share in shares)
