"""Scores of other systems: similarities and distances, CSV and Parquet, against the same scores as probabilities."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from batchverify.errors import ManifestError
from batchverify.evaluation.evaluate import evaluate
from batchverify.options import EvaluateOptions


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    cosine = np.clip(rng.normal(0.7 - 0.4 * label, 0.15), -1, 1).round(3)
    names = [f"{row}.jpg" for row in range(400)]
    return pa.table({"image_a": names, "image_b": names[::-1], "label": label, "cosine": cosine})


def save(table, path):
    (pa.csv.write_csv if path.suffix == ".csv" else pq.write_table)(table, path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_similarity_and_distance_have_the_figures_of_their_order(cells, tmp_path, kind):
    path = save(cells, tmp_path / f"theirs.{kind}")
    found = evaluate(path, score="cosine", threshold=0.5, draws=0).document
    label, cosine = cells["label"].to_numpy(), cells["cosine"].to_numpy()
    assert found["metrics"]["far"] == (cosine[label == 1] > 0.5).mean()
    assert found["metrics"]["frr"] == (cosine[label == 0] <= 0.5).mean()
    assert all(found["metrics"][name] is None for name in ("ece", "brier", "log_loss", "cllr"))
    assert found["score"]["threshold"] == pytest.approx(0.5)
    far = cells.append_column("distance", pa.array(1 - cosine))
    other = evaluate(
        save(far, tmp_path / f"far.{kind}"), score="distance", higher_is="different", threshold=0.5, draws=0
    ).document
    assert other["metrics"]["auc"] == found["metrics"]["auc"]
    assert other["metrics"]["d_prime"] == pytest.approx(found["metrics"]["d_prime"], abs=1e-5)


def test_they_are_compared_with_one_of_our_runs(cells, tmp_path):
    theirs = save(cells, tmp_path / "theirs.csv")
    record = {b"batchverify": b'{"threshold": 0.5}'}
    ours = cells.drop_columns(["cosine", "label"]).append_column("true_label", cells["label"].cast(pa.int8()))
    ours = ours.append_column("probability", pa.array((1 - cells["cosine"].to_numpy()) / 2, pa.float32()))
    run = save(ours.replace_schema_metadata(record), tmp_path / "ours.parquet")
    for first, second in ((run, theirs), (theirs, run)):
        options = EvaluateOptions(score="cosine", draws=40, no_images=True)
        found = evaluate(first, tmp_path / "out", second, options).document
        assert found["comparison"]["same_pairs"]
        assert abs(found["comparison"]["differences"]["auc"]["difference"]) < 1e-4
        assert (tmp_path / "out" / "report.html").exists()


def test_rows_without_a_number_failed(cells, tmp_path):
    cosine = cells["cosine"].to_numpy().copy()
    cosine[:3] = [np.nan, np.inf, -np.inf]
    path = save(cells.set_column(3, "cosine", pa.array(cosine)), tmp_path / "x.parquet")
    found = evaluate(path, score="cosine", draws=0).document
    assert (found["failed"], found["scored"]) == (3, 397)


def test_a_number_that_stands_for_no_score_is_said(cells, tmp_path):
    cosine = cells["cosine"].to_numpy().copy()
    cosine[7] = 1e9
    path = save(cells.set_column(3, "cosine", pa.array(cosine)), tmp_path / "x.csv")
    with pytest.raises(ManifestError, match=r"row 8: column 'cosine' holds 1e\+09, so far from the others"):
        evaluate(path, score="cosine", draws=0)
    # As a distance nothing is lost: floats are finest near 0.
    assert evaluate(path, score="cosine", higher_is="different", draws=0).document["scored"] == 400
    cosine[7] = 9.0
    path = save(cells.set_column(3, "cosine", pa.array(cosine)), tmp_path / "x.csv")
    assert evaluate(path, score="cosine", draws=0).document["scored"] == 400


def test_other_columns_of_a_csv_serve_as_qualities_and_groups(cells, tmp_path):
    rng = np.random.default_rng(1)
    cells = cells.append_column("sharpness", pa.array(rng.random(400)))
    for side in "ab":
        cells = cells.append_column(f"origin_{side}", pa.array(rng.choice(["north", "south"], 400)))
    options = EvaluateOptions(score="cosine", quality=("sharpness",), group_a="origin_a", group_b="origin_b", draws=0)
    found = evaluate(save(cells, tmp_path / "x.csv"), options=options).document
    assert found["quality"][0]["pairs"] == 400
    assert [each["group"] for each in found["groups"]["groups"]] == ["north", "south"]
    path = tmp_path / "latin.csv"
    path.write_bytes((tmp_path / "x.csv").read_bytes().replace(b"north", b"n\xf6rd"))
    for changes in ({}, {"group_a": None, "group_b": None, "by": "origin_a"}):
        with pytest.raises(ManifestError, match=r"row \d+: column 'origin_.': not UTF-8"):
            evaluate(path, options=options, **changes)


def test_what_cannot_be_used_is_refused_with_its_place(cells, tmp_path):
    path = save(cells, tmp_path / "x.csv")
    with pytest.raises(ManifestError, match=r"no column 'cos'; the file has image_a, image_b, label, cosine"):
        evaluate(path, score="cos", draws=0)
    with pytest.raises(ManifestError, match=r"row 1: column 'image_a' must hold numbers, got '0.jpg'"):
        evaluate(path, score="image_a", draws=0)
    bare = save(cells.drop_columns(["label"]), tmp_path / "bare.csv")
    with pytest.raises(ManifestError, match="give labels as --truth or --threshold"):
        evaluate(bare, score="cosine", draws=0)


def test_a_reference_without_labels_has_those_of_the_same_pairs(cells, tmp_path):
    ours = save(cells, tmp_path / "ours.parquet")
    theirs = save(cells.drop_columns(["label"]), tmp_path / "theirs.parquet")
    found = evaluate(ours, reference=theirs, score="cosine", draws=0).document
    assert found["comparison"]["same_pairs"]
    assert found["comparison"]["flipped"]["pairs"] == 0


def test_a_threshold_beyond_all_scores_calls_nobody_different(cells, tmp_path):
    path = save(cells, tmp_path / "theirs.parquet")
    found = evaluate(path, score="cosine", threshold=-5.0, draws=0).document
    assert (found["metrics"]["far"], found["metrics"]["frr"]) == (1, 0)


def test_files_that_do_not_fit_together_and_scores_without_bounds(cells, tmp_path):
    (tmp_path / "parts").mkdir()
    save(cells, tmp_path / "parts" / "a.parquet")
    save(cells.append_column("more", pa.array(["x"] * 400)), tmp_path / "parts" / "b.parquet")
    assert evaluate(tmp_path / "parts", score="cosine", draws=0).document["rows"] == 800
    save(cells.append_column("more", pa.array(range(400))), tmp_path / "parts" / "c.parquet")
    with pytest.raises(ManifestError, match="columns of different types"):
        evaluate(tmp_path / "parts", score="cosine", draws=0)
    wide = pa.array(np.where(np.arange(400) % 2, 1e308, -1e308))
    with pytest.raises(ManifestError, match="too far to be scaled"):
        evaluate(save(cells.append_column("wide", wide), tmp_path / "wide.parquet"), score="wide", draws=0)
    bad = save(cells.append_column("text", pa.array(["1_000"] * 400)), tmp_path / "text.parquet")
    with pytest.raises(ManifestError, match="must hold numbers"):
        evaluate(bad, score="text", draws=0)


def test_our_thresholds_are_not_for_scores_of_others(cells, tmp_path):
    from batchverify.errors import UsageError

    ours = save(cells, tmp_path / "theirs.csv")
    evaluate(ours, score="cosine", draws=0)
    with pytest.raises(UsageError, match="no run record"):
        evaluate(ours, score="cosine", at_far=0.01, draws=0)
