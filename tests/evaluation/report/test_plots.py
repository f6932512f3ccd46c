"""The data of the plots against slow counts, and their size."""

import json

import numpy as np
import pyarrow as pa
import pytest
from score_tables import draw_columns, write_scores

from batchverify.evaluation import worst_pairs
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.report import plots
from batchverify.evaluation.scores import ScoreFile, Scores, read_scores


def scores_of(tmp_path, columns, **record) -> Scores:
    return read_scores(ScoreFile.open(write_scores(tmp_path / "s.parquet", columns, **record)))


def measured(scores: Scores) -> MeasuredPairs:
    return MeasuredPairs(scores.truth, scores.probability, scores.threshold)


def test_the_explorer_counts_what_each_threshold_accepts(tmp_path):
    labels = pa.array(np.random.default_rng(0).choice(np.array([0, 1, None]), 400), pa.int8())
    scores = scores_of(tmp_path, draw_columns(400, true_label=labels), threshold=0.4950772622391619)
    found = plots.explorer(scores)
    grid = np.array(found["grid"], np.float32)
    assert grid[found["start"]] == np.float32(0.4950772622391619)
    assert (np.diff(grid) > 0).all()
    assert (grid[0], grid[-1]) == (0, 1)
    for kind, code in (("same", 0), ("different", 1), ("unknown", -1)):
        inside = scores.probability[(scores.truth == code) & scores.scored]
        for place in (0, 1, 300, found["start"], len(grid) - 1):
            assert found["accepted"][kind][place] == (inside < grid[place]).sum()
        assert found["totals"][kind] == len(inside)
    # A score at a threshold is called different.
    at_the_grid = scores_of(tmp_path, draw_columns(9, failed=0.0, probability=pa.array([0.25] * 9, pa.float32())))
    found = plots.explorer(at_the_grid)
    place = found["grid"].index(0.25)
    assert [sum(each[place + next_] for each in found["accepted"].values()) for next_ in (0, 1)] == [0, 9]
    counts = measured(scores_of(tmp_path, draw_columns(400), threshold=0.3)).counts()
    found = plots.explorer(scores_of(tmp_path, draw_columns(400), threshold=0.3))
    assert found["accepted"]["different"][found["start"]] == counts["false_accepts"]


def test_histograms_count_every_scored_pair_once(tmp_path):
    scores = scores_of(tmp_path, draw_columns(500, similarity=pa.array(np.linspace(-0.3, 1.0000001, 500))))
    for name, found in plots.histograms(scores).items():
        assert sum(map(sum, found["counts"].values())) == scores.scored.sum(), name
        assert len(found["edges"]) == plots.HISTOGRAM_BINS + 1


@pytest.mark.parametrize("pairs", [60, 20_000])
def test_points_of_the_curves_lie_on_them_and_are_few(tmp_path, pairs):
    scores = scores_of(tmp_path, draw_columns(pairs, failed=0.0))
    found = plots.curves(measured(scores))
    assert len(found["far"]) <= 1000
    same, different = (np.sort(scores.probability[scores.truth == code]) for code in (0, 1))
    true = {
        (round(float((different < each).mean()), 6), round(float((same >= each).mean()), 6))
        for each in [*np.unique(scores.probability).tolist()[:: max(1, pairs // 2000)], 2.0]
    }
    points = {(round(a, 6), round(b, 6)) for a, b in zip(found["far"], found["frr"], strict=True)}
    assert (points <= true) if pairs == 60 else {(0.0, 1.0), (1.0, 0.0)} <= points
    assert found["far"] == sorted(found["far"])
    assert found["frr"] == sorted(found["frr"], reverse=True)
    here = (scores.probability >= np.float32(0.5)) & (scores.truth == 0)
    assert found["here"][1] == pytest.approx(here.sum() / len(same))


def test_calibration_bins_are_slow_means_with_their_intervals(tmp_path):
    scores = scores_of(tmp_path, draw_columns(800, failed=0.0))
    found = plots.calibration(measured(scores))
    bins = np.minimum((scores.probability.astype(float) * 15).astype(int), 14)
    for place, each in enumerate(np.unique(bins)):
        inside = bins == each
        assert found["mean"][place] == pytest.approx(scores.probability[inside].mean(), rel=1e-4)
        assert found["share"][place] == pytest.approx(scores.truth[inside].mean(), rel=1e-4)
        assert found["low"][place] <= found["share"][place] <= found["high"][place]
    # Wilson's interval for 0 of 10.
    pairs = MeasuredPairs(np.zeros(10, np.int8), np.zeros(10, np.float32), 0.5)
    assert plots.calibration(pairs)["high"] == [pytest.approx(0.2775, abs=1e-3)]


def test_the_embedded_numbers_do_not_grow_with_the_pairs(tmp_path):
    scores = scores_of(tmp_path, draw_columns(50_000))
    text = json.dumps([plots.histograms(scores), plots.curves(measured(scores)), plots.explorer(scores)])
    assert len(text) < 100_000


def test_examples_are_the_worst_and_the_nearest(tmp_path):
    scores = scores_of(tmp_path, draw_columns(400, seed=4))
    p, truth = scores.probability.astype(float), scores.truth
    order = sorted(np.flatnonzero(scores.scored).tolist(), key=lambda row: (p[row], row))
    wrong = [row for row in order if truth[row] == 1 and p[row] < 0.5]
    assert worst_pairs.false_accepts(scores).tolist() == wrong
    wrong = [row for row in order if truth[row] == 0 and p[row] >= 0.5]
    assert p[worst_pairs.false_rejects(scores)].tolist() == sorted(p[wrong], reverse=True)
    near = sorted(abs(p[row] - 0.5) for row in order)
    assert np.abs(p[worst_pairs.nearest(scores)] - 0.5) == pytest.approx(near)
    lost = np.flatnonzero(~scores.scored)
    assert worst_pairs.failed(scores, "no_face").tolist() == lost[:4].tolist()


def test_equal_errors_keep_their_order(tmp_path):
    probability = pa.array([0.2, 0.1, 0.1, 0.3, 0.1, 0.1], pa.float32())
    columns = draw_columns(6, probability=probability, true_label=pa.array(np.ones(6, np.int8)))
    assert worst_pairs.false_accepts(scores_of(tmp_path, columns)).tolist() == [1, 2, 4, 5, 0, 3]


def test_what_cannot_be_drawn_is_none(tmp_path):
    """An empty object is true in JavaScript."""
    scores = scores_of(tmp_path, draw_columns(30, failed=2.0))
    pairs = measured(scores)
    assert plots.histograms(scores) is plots.curves(pairs) is plots.calibration(pairs) is None
    assert plots.explorer(scores) is plots.overlaid(scores, scores) is None
    assert plots.scatter(scores, scores, np.zeros(0, np.int64)) is None
    one_kind = MeasuredPairs(np.ones(9, np.int8), np.linspace(0, 1, 9, dtype=np.float32), 0.5)
    assert plots.curves(one_kind) is None
