"""Two runs compared: paired differences, agreement, flips, drift; slices and folds against slow loops."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics as reference
from scipy import stats
from score_tables import draw_columns, write_scores

from batchverify.evaluation.bootstrap import bootstrap
from batchverify.evaluation.comparison import (
    beyond_chance,
    chance_index,
    compare,
    measure_drift,
    record_differences,
    same_pairs,
    stability_index,
)
from batchverify.evaluation.figures import NAMES, MeasuredPairs
from batchverify.evaluation.scores import ScoreFile, read_scores, read_units
from batchverify.evaluation.slices import (
    MOST_SLICES,
    OTHERS,
    measure_folds,
    measure_slices,
    slice_codes,
    summarise_folds,
)


def scores_of(path, columns, **record):
    return read_scores(ScoreFile.open(write_scores(path, columns, **record)))


@pytest.fixture
def runs(tmp_path):
    """A run and a noisier one of the same pairs, with other failures and another threshold."""
    columns = draw_columns(600, seed=1)
    rng = np.random.default_rng(5)
    noisy = np.clip(
        np.nan_to_num(columns["probability"].to_numpy(zero_copy_only=False)) + rng.normal(0, 0.3, 600), 0, 1
    )
    lost = rng.random(600) < 0.1
    other = columns | {"probability": pa.array(noisy.astype(np.float32), mask=lost)}
    return scores_of(tmp_path / "new.parquet", columns), scores_of(tmp_path / "old.parquet", other, threshold=0.4)


def test_differences_are_those_of_the_pairs_that_both_scored(runs):
    new, old = runs
    units = read_units(new.file)
    found = compare(new, old, units, same=True, draws=50, seed=2).document
    both = new.scored & old.scored
    truth = new.truth[both]
    aucs = [reference.roc_auc_score(truth, each.probability[both].astype(float)) for each in runs]
    f1 = [reference.f1_score(truth, each.probability[both] >= np.float32(each.threshold)) for each in runs]
    for name, values in (("auc", aucs), ("f1", f1)):
        each = found["differences"][name]
        assert [each["new"], each["reference"]] == pytest.approx(values, abs=1e-12)
        assert each["difference"] == pytest.approx(values[0] - values[1], abs=1e-12)
        assert each["interval"][0] < each["difference"] < each["interval"][1]

    def slow(weights):
        kept = [reference.roc_auc_score(truth, each.probability[both], sample_weight=weights) for each in runs]
        return {"auc": kept[0] - kept[1]}

    spans = bootstrap(units.subset(np.flatnonzero(both)), slow, draws=50, seed=2)
    assert found["differences"]["auc"]["interval"] == pytest.approx(spans["auc"], abs=1e-9)


def test_a_paired_interval_is_narrower_than_two(runs, tmp_path):
    new, _ = runs
    units = read_units(new.file)
    columns = new.file.table(new.file.schema.names)
    rng = np.random.default_rng(0)
    near = np.clip(new.probability + rng.normal(0, 0.01, 600), 0, 1).astype(np.float32)
    columns = {name: columns.column(name) for name in columns.column_names}
    other = scores_of(tmp_path / "near.parquet", columns | {"probability": pa.array(near, mask=np.isnan(near))})
    found = compare(new, other, units, same=True, draws=50, seed=0).document["differences"]["auc"]
    pairs = MeasuredPairs(new.truth, new.probability, 0.5)
    low, high = bootstrap(units, pairs.figures, draws=50, seed=0)["auc"]
    assert found["interval"][1] - found["interval"][0] < (high - low) / 2


def test_runs_that_differ_in_no_draw_have_no_interval(runs):
    new, _ = runs
    same = compare(new, new, read_units(new.file), same=True, draws=50, seed=0).document["differences"]
    assert all((each["difference"], each["interval"]) == (0, None) for each in same.values())


def test_agreement_and_flips_count_every_pair(runs):
    new, old = runs
    found = compare(new, old, None, same=True, draws=0, seed=0)
    calls = [
        np.where(
            each.scored,
            np.where(each.probability >= np.float32(each.threshold), "different", "same"),
            "not scored",
        )
        for each in runs
    ]
    frame = pd.DataFrame(
        {"truth": np.array(["same", "different"])[new.truth], "new": calls[0], "reference": calls[1]}
    )
    expected = frame.value_counts().to_dict()
    agreement = found.document["agreement"]
    assert {(row["truth"], row["new"], row["reference"]): row["pairs"] for row in agreement} == expected
    flipped = frame[(frame.new != frame.reference) & (frame.new != "not scored") & (frame.reference != "not scored")]
    assert sorted(found.flipped.tolist()) == flipped.index.tolist()
    moved = np.abs(new.probability - old.probability)[found.flipped]
    assert (np.diff(moved) <= 0).all()
    fixed, broken = (flipped.new == flipped.truth).sum(), (flipped.reference == flipped.truth).sum()
    assert found.document["flipped"] == {"pairs": len(flipped), "fixed": fixed, "broken": broken}
    assert "interval" not in json.dumps(found.document["drift"])


def test_other_pairs_are_told_from_the_same_however_they_are_cut(tmp_path):
    columns = draw_columns(300)
    file = ScoreFile.open(write_scores(tmp_path / "one.parquet", columns))
    columns["image_a"] = pa.chunked_array([pa.array(columns["image_a"][:7]), pa.array(columns["image_a"][7:])])
    assert same_pairs(ScoreFile.open(write_scores(tmp_path / "two.parquet", columns)), file)
    for change in ({"image_a": columns["image_b"]}, {"image_b": [*columns["image_b"][:-1], "new.jpg"]}):
        assert not same_pairs(ScoreFile.open(write_scores(tmp_path / "x.parquet", columns | change)), file)
    other = scores_of(tmp_path / "other.parquet", draw_columns(200, seed=9))
    assert not same_pairs(file, other.file)
    found = compare(read_scores(file), other, None, same=False, draws=0, seed=0)
    assert found.document["same_pairs"] is False
    assert "differences" not in found.document
    assert len(found.flipped) == 0
    assert found.document["drift"]["probability"]["stability_index"] > 0


def test_runs_tell_what_they_were_made_with(tmp_path):
    columns = draw_columns(60)
    crop = {"mode": "detect", "margin": 44}
    made = {"head": "a", "embedding": {"crop": crop, "size": 160}, "seconds": 3.0, "job": {"head": "a"}}
    other = {"head": "b", "embedding": {"crop": crop | {"mode": "center"}, "size": 160}, "seconds": 4.0}
    new = scores_of(tmp_path / "new.parquet", columns, **made, options={"limit": 60})
    old = scores_of(tmp_path / "old.parquet", columns, **other, threshold=0.4, manifest=new.file.record["manifest"])
    assert record_differences(new, old) == [
        {"key": "embedding.crop.mode", "new": "detect", "reference": "center"},
        {"key": "head", "new": "a", "reference": "b"},
        {"key": "options.limit", "new": 60, "reference": None},
        {"key": "threshold", "new": 0.5, "reference": 0.4},
    ]
    assert record_differences(new, new) == []
    found = compare(new, old, None, same=True, draws=0, seed=0).document
    assert found["reference_record"]["head"] == "b"


def slow_index(new, old, bins=10):
    edges = [-np.inf, *np.unique(np.quantile(old, [k / bins for k in range(1, bins)])), np.inf]
    total, counts = 0.0, []
    for values in (new, old):
        inside = [sum(low <= each < high for each in values) for low, high in pairwise(edges)]
        counts.append([max(each, 0.5) for each in inside])
    for p, q in zip(*counts, strict=True):
        p, q = p / sum(counts[0]), q / sum(counts[1])
        total += (p - q) * np.log(p / q)
    return total


def test_the_stability_index_is_the_slow_sum():
    rng = np.random.default_rng(0)
    for old, new in [
        (rng.random(500), rng.random(300) ** 2),
        (rng.integers(0, 3, 200).astype(float), rng.integers(1, 4, 200).astype(float)),
        (np.zeros(10), np.ones(10)),
    ]:
        assert stability_index(new, old) == pytest.approx(slow_index(new.tolist(), old.tolist()))
    assert stability_index(old, old) == 0
    same = [stability_index(*rng.random((2, 1000))) for _ in range(1000)]
    chance = chance_index(1000, 1000)
    assert np.mean(same) == pytest.approx(chance, rel=0.1)
    assert 0.002 <= np.mean([beyond_chance(each, chance) for each in same]) <= 0.02


@pytest.mark.parametrize(
    ("shift", "pairs", "verdict"),
    [
        (0.0, 5000, "no notable drift"),
        (0.4, 5000, "some drift"),
        (1.0, 5000, "strong drift"),
        (0.0, 100, "too few pairs"),
        (0.3, 100, "too few pairs"),
        (2.0, 100, "strong drift"),
    ],
)
def test_the_verdict_is_plain(tmp_path, shift, pairs, verdict):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, pairs)) + np.array([[shift], [0]])
    runs = [
        scores_of(tmp_path / f"{at}.parquet", draw_columns(pairs, probability=pa.array(1 / (1 + np.exp(-each)))))
        for at, each in enumerate(logits)
    ]
    found = measure_drift(*runs)
    assert found["probability"]["verdict"].startswith(verdict)
    assert found["called_different"]["share"] == [pytest.approx((each > 0).mean()) for each in logits]


@pytest.mark.parametrize(
    ("rates", "pairs", "verdict"),
    [
        ((0.045, 0.0), 1000, "more than chance explains"),
        ((0.0, 0.045), 1000, "fewer than chance explains"),
        ((0.05, 0.05), 1000, "no more than chance explains"),
        ((0.06, 0.0), 50, "no more than chance explains"),
    ],
)
def test_more_failures_than_chance_explains_are_said(tmp_path, rates, pairs, verdict):
    failed = [pa.array(np.arange(pairs) < rate * pairs) for rate in rates]
    values = np.linspace(0, 1, pairs).astype(np.float32)
    runs = [
        scores_of(tmp_path / f"{at}.parquet", draw_columns(pairs, probability=pa.array(values, mask=np.array(each))))
        for at, each in enumerate(failed)
    ]
    found = measure_drift(*runs)["failure_rate"]
    assert found["share"] == [pytest.approx(rate) for rate in rates]
    assert found["verdict"] == verdict
    expected = stats.chi2_contingency([[sum(each.to_pylist()), pairs] for each in failed])[1]
    assert (found["p_value"] < 0.01) == (expected < 0.01)


def test_a_run_that_scored_nothing_has_no_share_called_different(tmp_path):
    runs = [scores_of(tmp_path / f"{at}.parquet", draw_columns(60, failed=at * 2.0)) for at in (0, 1)]
    found = measure_drift(*runs)
    assert (found["called_different"]["share"][1], found["called_different"]["p_value"]) == (None, None)
    assert found["failure_rate"]["verdict"] == "fewer than chance explains"


def test_slices_are_the_figures_of_their_rows_and_the_odd_one_is_marked(tmp_path):
    columns = draw_columns(3000, seed=3, people=400)
    rng = np.random.default_rng(0)
    cameras = rng.choice(["north", "south", "east"], 3000)
    probability = columns["probability"].to_numpy(zero_copy_only=False).copy()
    spoilt = (cameras == "east") & (columns["true_label"].to_numpy() == 0) & (rng.random(3000) < 0.3)
    probability[spoilt] = 0.9
    columns |= {"camera": cameras, "probability": pa.array(probability, mask=np.isnan(probability))}
    scores = scores_of(tmp_path / "s.parquet", columns)
    slices = measure_slices(scores, scores.file.column("camera"), read_units(scores.file), draws=60, seed=0)
    assert sorted(each["value"] for each in slices) == ["east", "north", "south"]
    for each in slices:
        inside = (cameras == each["value"]) & scores.scored
        truth, calls = scores.truth[inside], scores.probability[inside] >= np.float32(0.5)
        assert each["pairs"] == (cameras == each["value"]).sum()
        assert each["f1"] == pytest.approx(reference.f1_score(truth, calls))
        assert each["frr"] == pytest.approx(calls[truth == 0].mean())
        assert each.keys() >= NAMES.keys() | {"tar@1e-1"}
        p = scores.probability[inside].astype(float)
        assert each["average_precision"] == pytest.approx(reference.average_precision_score(truth, p))
        assert each["log_loss"] == pytest.approx(reference.log_loss(truth, p))
        assert each["intervals"]["frr"][0] < each["frr"] < each["intervals"]["frr"][1]
    marks = {each["value"]: each["differs"] for each in slices}
    assert marks["east"] == {"frr": "higher"}
    assert "higher" not in str([marks["north"], marks["south"]])


def test_intervals_of_slices_are_the_bootstrap_of_their_rows(tmp_path):
    scores = scores_of(tmp_path / "s.parquet", draw_columns(800, seed=3))
    units, cameras = read_units(scores.file), np.array(scores.file.column("camera").to_pylist())
    for each in measure_slices(scores, scores.file.column("camera"), units, draws=50, seed=4):
        inside = scores.scored & (cameras == each["value"])
        for rate, kind in (("far", 1), ("frr", 0)):
            chosen = inside & (scores.truth == kind)
            wrong = scores.calls[chosen] != kind

            def share(weights, chosen=chosen, wrong=wrong):
                return {"share": weights[chosen] @ wrong / weights[chosen].sum()}

            expected = bootstrap(units, share, draws=50, seed=4)["share"]
            assert each["intervals"][rate] == pytest.approx(expected)
        assert each["exact"] == []


def test_a_slice_without_an_error_has_the_exact_bound(tmp_path):
    columns = draw_columns(200, failed=0.0)
    truth = columns["true_label"].to_numpy()
    columns |= {"probability": pa.array(np.where(truth == 1, 0.9, 0.1))}
    scores = scores_of(tmp_path / "s.parquet", columns)
    for each in measure_slices(scores, scores.file.column("camera"), read_units(scores.file), draws=40, seed=0):
        assert each["intervals"]["far"] == (0, pytest.approx(1 - 0.025 ** (1 / each["different"])))
        assert each["exact"] == ["far", "frr"]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 9, 100, None], ["9", "10", "100", "(blank)"]),
        (["10", "9", "100", "", "10"], ["9", "10", "100", "(blank)"]),
        ([2.5, -1.0, 2.5], ["-1.0", "2.5"]),
        (["b", "10", "9", "b"], ["b", "10", "9"]),
        ([True, False, False], ["False", "True"]),
    ],
)
def test_numbers_stand_in_their_order(values, names):
    codes, found = slice_codes(pa.chunked_array([pa.array(values)]))
    assert list(found) == names
    texts = ["(blank)" if each in (None, "") else str(each) for each in values]
    assert [found[code] for code in codes] == texts


def test_slices_that_differ_by_chance_alone_are_seldom_marked(tmp_path):
    marked = 0
    for seed in range(20):
        scores = scores_of(tmp_path / "s.parquet", draw_columns(1500, seed=seed, people=300))
        cells = pa.chunked_array([np.random.default_rng(seed).choice(list("abcde"), 1500)])
        marked += any(each["differs"] for each in measure_slices(scores, cells, None, draws=0, seed=0))
    assert marked <= 3


def test_many_values_blank_cells_and_numbers_make_slices():
    values = pa.chunked_array([pa.array([*range(60), *range(40), None, None])])
    codes, names = slice_codes(values)
    assert (len(names), names[-1]) == (MOST_SLICES + 1, OTHERS)
    assert names[codes[100]] == "(blank)"
    assert np.bincount(codes)[-1] == 60 + 40 + 2 - np.bincount(codes)[:-1].sum()
    codes, names = slice_codes(pa.chunked_array([["x", "", None, "x"]]))
    assert [names[code] for code in codes] == ["x", "(blank)", "(blank)", "x"]
    assert slice_codes(pa.chunked_array([[1.5, float("nan"), None]]))[1] == ("1.5", "(blank)")


def test_a_column_may_have_a_value_for_every_pair():
    codes, names = slice_codes(pa.chunked_array([[f"image {each}" for each in range(200_000)]]))
    assert np.bincount(codes)[-1] == 200_000 - MOST_SLICES == 200_000 + 1 - len(names)


def test_folds_take_their_thresholds_from_the_others():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400).astype(np.int8)
    scores = np.clip(rng.normal(0.3 + 0.4 * truth, 0.2), 0, 1).astype(np.float32)
    names = rng.permutation(np.repeat(np.arange(1, 11), 40))
    pairs = MeasuredPairs(truth, scores, 0.1)
    found = measure_folds(pairs, pa.chunked_array([names]))
    assert [fold["name"] for fold in found] == [str(each) for each in range(1, 11)]
    accuracies = []
    for fold in found:
        rest, inside = names != int(fold["name"]), names == int(fold["name"])
        best = max(((scores[rest] >= each) == truth[rest]).mean() for each in np.unique(scores))
        assert ((scores[rest] >= np.float32(fold["threshold"])) == truth[rest]).mean() == best
        accuracies.append(((scores[inside] >= np.float32(fold["threshold"])) == truth[inside]).mean())
        assert fold["figures"]["accuracy"] == pytest.approx(accuracies[-1])
    summary = summarise_folds(found)["figures"]["accuracy"]
    assert summary["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert summary["error"] == pytest.approx(summary["std"] / 10**0.5)


@pytest.mark.parametrize("blank", ["", None, float("nan")])
def test_pairs_without_a_fold_take_no_part(blank):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 90).astype(np.int8)
    pairs = MeasuredPairs(truth, np.clip(rng.normal(0.3 + 0.4 * truth, 0.2), 0, 1).astype(np.float32), 0.5)
    names = ["1", "2", blank] if blank == "" else [1, 2, blank]
    found = measure_folds(pairs, pa.chunked_array([pa.array(names * 30)]))
    assert [(fold["name"], fold["pairs"]) for fold in found] == [("1", 30), ("2", 30)]


def test_one_fold_and_folds_without_both_kinds_are_none():
    pairs = MeasuredPairs(np.array([0, 1, 1], np.int8), np.array([0.1, 0.9, 0.8], np.float32), 0.5)
    assert measure_folds(pairs, pa.chunked_array([["a", "a", "a"]])) == []
    assert measure_folds(pairs, pa.chunked_array([["a", "b", "b"]])) == []
    assert summarise_folds([]) is None
