"""`evaluate` from end to end: files, the table, reports of poor input, pairs for review."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as reference
from click.testing import CliRunner
from lfw_cache import WHOLE, view_1
from repository import REPOSITORY
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.cli.app import main
from batchverify.errors import ManifestError, UsageError
from batchverify.evaluation.figures import NAMES

FACES = REPOSITORY / "sample_manifests" / "faces.csv"


@pytest.fixture(scope="module")
def faces(cache, tmp_path_factory):
    """The sample faces scored, with the embeddings in a cache: (scores, cache)."""
    folder = tmp_path_factory.mktemp("faces")
    batchverify.score(FACES, folder / "scores.parquet", cache=cache, quiet=True)
    return folder / "scores.parquet", Path(cache)


def run(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)], prog_name="batchverify")


def table(result) -> dict[str, str]:
    """The terminal's table by name."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in result.stderr.splitlines())


def documents(folder: Path):
    return json.loads((folder / "metrics.json").read_text()), (folder / "report.html").read_text()


@pytest.mark.weights
def test_figures_of_lfw_are_those_of_scikit_learn(shared, tmp_path, tmp_path_factory):
    folder, _ = view_1(shared, tmp_path_factory.getbasetemp())
    result = run(folder / "test.parquet", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    found, page = documents(tmp_path / "out")
    assert json.loads(result.stdout)["metrics"] == found["metrics"]
    scores = pq.read_table(folder / "test.parquet").to_pandas()
    truth, probability = scores["true_label"], scores["probability"].astype(float)
    calls = scores["label"]
    expected = {
        "auc": reference.roc_auc_score(truth, probability),
        "f1": reference.f1_score(truth, calls),
        "precision": reference.precision_score(truth, calls),
        "recall": reference.recall_score(truth, calls),
        "accuracy": reference.accuracy_score(truth, calls),
        "average_precision": reference.average_precision_score(truth, probability),
        "log_loss": reference.log_loss(truth, probability),
        "brier": reference.brier_score_loss(truth, probability),
    }
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-12), name
        low, high = found["intervals"][name]
        assert low <= value <= high
    assert found["bootstrap"] == {
        "draws": 200,
        "unit": "identities",
        "units": 963 if WHOLE else 612,
        "exact": ["failure_rate"],
    }
    assert [rate["supported"] for rate in found["rates"]] == [True] + [False] * 5
    assert len(page) < 15e6


def test_a_run_of_faces_is_measured_shown_and_written(faces, tmp_path):
    result = run(faces[0], "-o", tmp_path / "out", "--by", "person_a")
    assert result.exit_code == 0, result.stderr
    found, page = documents(tmp_path / "out")
    shown = table(result)
    assert shown["F1"].startswith(f"{found['metrics']['f1']:.5f}  [")
    assert shown["written to"].endswith("report.html")
    assert shown["TAR at FAR 0.1 and below"] == "needs 100 different pairs, 28 available"
    assert len(found["slices"]["person_a"]) == len(set(pd.read_csv(FACES)["person_a"]))
    # Faces by their boxes in the cache: every image is there.
    assert page.count('<img src="data:image/jpeg;base64,') == 2 * page.count('<li tabindex="')
    assert ': face"' in page
    assert "whole image" not in page


def test_no_images_and_images_that_are_gone(faces, tmp_path):
    assert run(faces[0], "-o", tmp_path / "none", "--no-images").exit_code == 0
    page = documents(tmp_path / "none")[1]
    assert "data:image/jpeg" not in page
    # Nor empty boxes.
    assert '<li tabindex="' in page
    assert 'class="gone"' not in page and 'class="faces"' not in page
    assert run(faces[0], "-o", tmp_path / "gone", "--image-root", tmp_path).exit_code == 0
    page = documents(tmp_path / "gone")[1]
    assert "data:image/jpeg" not in page
    assert "image not found" in page
    # Without boxes the whole image.
    assert run(faces[0], "-o", tmp_path / "whole", "--cache", tmp_path / "no-cache").exit_code == 0
    page = documents(tmp_path / "whole")[1]
    assert page.count("data:image/jpeg") == page.count('whole image"')


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--image-root", "elsewhere"], "outside --image-root"),
        (["--image-root", "."], "image not found"),
        ([], "image not found"),
        (["--no-images"], None),
    ],
)
def test_why_no_image_is_shown_is_said_once(tmp_path, monkeypatch, caplog, arguments, why):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    cells = [f"{'../' * ('elsewhere' in arguments)}images/{each % 12}.jpg" for each in range(60)]
    path = write_scores(tmp_path / "s.parquet", draw_columns(60, failed=0.0, image_a=cells, image_b=cells))
    assert run(path, "-o", "out", "--draws", 0, *arguments).exit_code == 0
    said = [record.getMessage() for record in caplog.records]
    if why is None:
        assert said == []
    else:
        assert len(said) == 1
        assert re.fullmatch(rf"the report shows no images \({why}: \d+\); see --image-root", said[0])
        assert f">{why}</div>" in (tmp_path / "out" / "report.html").read_text()


def test_truth_from_a_manifest_is_the_truth_of_the_scores(faces, tmp_path):
    frame = pd.read_csv(FACES)
    unlabelled = tmp_path / "unlabelled.csv"
    frame.drop(columns="label").to_csv(unlabelled, index=False)
    scores = tmp_path / "unlabelled.parquet"
    batchverify.score(unlabelled, scores, cache=str(faces[1]), image_root=FACES.parent, quiet=True)
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "truth.csv", index=False)
    plain = batchverify.evaluate(faces[0]).document
    other = batchverify.evaluate(scores, truth=str(tmp_path / "truth.csv")).document
    assert other["metrics"] == plain["metrics"]
    assert other["truth"]["source"].endswith("truth.csv")


def test_without_truth_there_are_distributions_and_drift(tmp_path):
    new = write_scores(tmp_path / "new.parquet", draw_columns(400, true_label=None))
    old = write_scores(tmp_path / "old.parquet", draw_columns(400, seed=1, true_label=None))
    result = run(new, old, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    shown = table(result)
    assert shown["truth"].startswith("unknown: give a manifest with labels as --truth")
    assert "ROC AUC" not in shown
    assert re.match(r"stability index 0\.\d+: no notable drift", shown["drift of probability"])
    assert re.fullmatch(
        r"0\.\d{4}, reference 0\.\d{4}: no more than chance explains", shown["share called different"]
    )
    found, page = documents(tmp_path / "out")
    assert set(found["metrics"].values()) == {None}
    assert {"plot-probability", "explore-called-same", 'id="nearest"'} <= set(
        re.findall(r'id="nearest"|plot-probability|explore-called-same', page)
    )
    assert 'id="explore-far"' not in page


@pytest.mark.parametrize("kind", [0, 1])
def test_one_kind_of_pair_gives_the_figures_that_it_can(tmp_path, kind):
    columns = draw_columns(300, true_label=pa.array([kind] * 300, pa.int8()))
    result = run(write_scores(tmp_path / "s.parquet", columns), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found, page = documents(tmp_path / "out")
    assert found["metrics"]["auc"] is None
    assert (found["metrics"]["far"] is None) == (kind == 0)
    assert (found["metrics"]["frr"] is None) == (kind == 1)
    missing = "different" if kind == 0 else "same"
    assert f"figures that need {missing} pairs are left out" in table(result)["truth"]
    assert f"No pair is labelled {missing}" in page
    shown = table(result)["TAR at FAR 0.1 and below"]
    assert shown == ("needs same pairs" if kind else "needs 100 different pairs, 0 available")
    assert f"not supported: {shown}" in page
    # With one kind of pair it is 0 or 1, whatever the run.
    assert found["metrics"]["precision"] is None
    assert "explore-precision" not in page
    assert "explore-false-rejects" in page if kind == 0 else "explore-false-accepts" in page


def test_a_run_that_failed_wholly_is_reported_by_reason(tmp_path):
    columns = draw_columns(50, failed=2.0)
    result = run(write_scores(tmp_path / "s.parquet", columns), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found, page = documents(tmp_path / "out")
    assert (found["scored"], found["failures"], found["metrics"]["failure_rate"]) == (0, {"no_face": 50}, 1.0)
    assert table(result)["not scored"] == "50 (no_face 50)"
    assert "Not scored: no_face" in page
    assert "No pair could be scored" in page
    assert "scored different pairs, 0 available" in table(result)["TAR at FAR 0.1 and below"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.parquet"], "none.parquet: no such file or folder"),
        (["pairs.csv"], "pairs.csv: not a readable Parquet file ("),
        (["s.parquet", "none.parquet"], "none.parquet: no such file or folder"),
        (["s.parquet", "--by", "colour"], "s.parquet: no column 'colour'; the file has image_a, "),
        (["s.parquet", "--truth", "none.csv"], "none.csv: no such file or folder"),
        (["s.parquet", "--threshold", "2"], "--threshold must lie between 0 and 1, got 2.0"),
        (["s.parquet", "--draws", "-1"], "--draws must lie between 0 and 10,000, got -1"),
        (["s.parquet", "--draws", "1"], "--draws must be 0 (no intervals) or at least 40, got 1"),
        (["s.parquet", "--draws", "39"], "--draws must be 0 (no intervals) or at least 40, got 39"),
        (
            ["s.parquet", "--export-worst", "9", "w.txt"],
            "w.txt: --export-worst writes .csv or .parquet files",
        ),
        (["s.parquet", "--export-worst", "0", "w.csv"], "--export-worst must name at least 1 pair, got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "s.parquet", draw_columns(20))
    (tmp_path / "pairs.csv").write_text("image_a,image_b\n")
    result = run(*arguments, "-o", "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_said(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(20))
    result = run(scores, "-o", scores)
    assert result.exit_code == 1
    assert "could not be written" in result.stderr


def test_two_runs_of_other_manifests_are_compared_by_their_distributions(tmp_path):
    paths = [write_scores(tmp_path / f"{seed}.parquet", draw_columns(300, seed=seed)) for seed in (0, 1)]
    result = run(*paths, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "the runs scored different pairs: only the distributions are compared" in result.stderr
    found, page = documents(tmp_path / "out")
    assert found["comparison"]["same_pairs"] is False
    assert "plot-drift" in page
    assert 'id="plot-scatter"' not in page


def test_truth_that_the_reference_alone_knows_is_taken(tmp_path):
    columns = draw_columns(400)
    noisy = 1 - columns["probability"].to_numpy(zero_copy_only=False)[::-1]
    changed = columns | {"probability": pa.array(noisy, mask=np.isnan(noisy))}
    old, known = (write_scores(tmp_path / f"{at}.parquet", each) for at, each in enumerate((columns, changed)))
    del changed["true_label"]
    new = write_scores(tmp_path / "new.parquet", changed)
    result = run(new, old, "-o", tmp_path / "out", "--draws", 0)
    found, page = documents(tmp_path / "out")
    own = batchverify.evaluate(known, reference=old, draws=0).document
    assert found["metrics"] == own["metrics"]
    assert found["comparison"]["flipped"] == own["comparison"]["flipped"]
    assert found["comparison"]["flipped"]["fixed"] + found["comparison"]["flipped"]["broken"] > 0
    assert found["truth"]["source"] == f"true_label of the reference {old}"
    assert table(result)["truth"].endswith(f"different; from true_label of the reference {old}")
    assert "the scores have none of their own" in page


def test_without_any_truth_nothing_is_said_to_be_fixed_or_broken(tmp_path):
    columns = draw_columns(200, true_label=None)
    runs = [
        write_scores(tmp_path / f"{name}.parquet", columns, threshold=threshold)
        for name, threshold in (("new", 0.5), ("old", 0.9))
    ]
    result = run(*runs, "-o", tmp_path / "out")
    found, page = documents(tmp_path / "out")
    flips = found["comparison"]["flipped"]
    assert flips.keys() == {"pairs"}
    assert table(result)["flipped"] == f"{flips['pairs']:,} pairs"
    assert f"<p>{flips['pairs']} pairs flipped.</p>" in page
    assert "the other way round" not in page
    # What made the difference is said.
    assert table(result)["differs in"] == "manifest, threshold"
    assert '<th scope="row">threshold</th><td>0.5</td><td>0.9</td>' in page


def test_more_failures_than_in_the_reference_are_flagged(tmp_path):
    columns = draw_columns(1000, failed=0.0)
    lost = np.arange(1000) % 22 == 0
    fewer = columns | {"probability": pa.array(columns["probability"].to_numpy(), mask=lost)}
    new, old = (write_scores(tmp_path / f"{at}.parquet", each) for at, each in enumerate((fewer, columns)))
    result = run(new, old, "-o", tmp_path / "out", "--draws", 0)
    assert table(result)["share not scored"] == "0.0460, reference 0.0000: more than chance explains"
    assert re.search(r'class="marked"><th scope="row">share not scored', documents(tmp_path / "out")[1])


def test_the_terminal_shows_every_main_figure_and_the_differences(tmp_path):
    columns = draw_columns(300)
    new = write_scores(tmp_path / "new.parquet", columns)
    result = run(new, write_scores(tmp_path / "old.parquet", columns, threshold=0.4), "-o", tmp_path / "out")
    found, shown = documents(tmp_path / "out")[0], table(result)
    for name in ("failure_rate", "average_precision", "log_loss"):
        low, high = found["intervals"][name]
        assert shown[NAMES[name]] == f"{found['metrics'][name]:.5f}  [{low:.4f}, {high:.4f}]"
    assert shown["ROC AUC, new - reference"].startswith("+0.00000")


def test_a_fold_column_asks_for_the_protocol(tmp_path):
    folds = [str(each % 3) for each in range(300)]
    result = run(write_scores(tmp_path / "s.parquet", draw_columns(300, fold=folds)), "-o", tmp_path / "out")
    found, page = documents(tmp_path / "out")
    accuracy = found["folds"]["figures"]["accuracy"]
    assert table(result)["3 folds"] == f"accuracy {accuracy['mean']:.5f} ± {accuracy['std']:.5f}"
    assert [each["name"] for each in found["folds"]["each"]] == ["0", "1", "2"]
    assert "<h2>3 folds</h2>" in page


@pytest.mark.parametrize("column", ["fold", "tags"])
def test_a_column_of_lists_makes_no_groups(tmp_path, column):
    columns: dict[str, Any] = {column: [[1]] * 30}
    path = write_scores(tmp_path / "s.parquet", draw_columns(30, **columns))
    result = run(path, "-o", tmp_path / "out", *(["--by", "tags"] if column == "tags" else []))
    assert result.exit_code == 2
    assert f"{path}: column '{column}' must hold single values, found list<" in result.stderr


def test_the_same_seed_gives_the_same_file(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(300))
    found = [batchverify.evaluate(scores, seed=seed, draws=40).document for seed in (0, 0, 1)]
    intervals = [each["intervals"] for each in found]
    assert intervals[0] == intervals[1] != intervals[2]
    assert batchverify.evaluate(scores, draws=0).document["intervals"] == {}


def test_a_rate_that_never_occurred_has_an_honest_interval(tmp_path):
    columns = draw_columns(
        200, probability=pa.array([0.9] * 200, pa.float32()), true_label=pa.array([1] * 200, pa.int8())
    )
    found = batchverify.evaluate(write_scores(tmp_path / "s.parquet", columns)).document
    assert found["metrics"]["far"] == 0
    bound = pytest.approx(1 - 0.025 ** (1 / 200))
    assert found["intervals"]["far"] == found["intervals"]["far_with_failures"] == [0, bound]
    assert "far" in found["bootstrap"]["exact"]


def test_a_perfect_run_is_not_said_to_be_certainly_perfect(tmp_path):
    truth = np.arange(300) % 3 == 0
    columns = draw_columns(
        300, probability=pa.array(np.where(truth, 0.9, 0.1)), true_label=pa.array(truth.astype(np.int8))
    )
    result = run(write_scores(tmp_path / "s.parquet", columns), "-o", tmp_path / "out")
    found, page = documents(tmp_path / "out")
    spans = found["intervals"]
    # Nothing is known about how far off these may be.
    assert not {"auc", "equal_error", "average_precision"} & spans.keys()
    low = 0.025 ** (1 / 100)
    assert spans["f1"] == [pytest.approx(low), 1]
    assert found["rates"][0]["interval"] == spans["tar@1e-1"] == [pytest.approx(0.025 ** (1 / 200)), 1]
    assert {"f1", "tar@1e-1", "far"} <= set(found["bootstrap"]["exact"])
    assert "log_loss" not in found["bootstrap"]["exact"]
    assert table(result)["ROC AUC"] == "1.00000"
    assert table(result)["F1"] == f"1.00000  [{low:.4f}, 1.0000]*"
    assert table(result)["*"] == "exact binomial bound, because all draws agree; assumes independent pairs"
    assert "assumes independent pairs" in page
    for name, trials in (("recall", 100), ("precision", 100), ("accuracy", 300)):
        assert found["metrics"][name] == 1
        assert spans[name] == [pytest.approx(0.025 ** (1 / trials)), 1]
    for name, trials in (("far", 100), ("frr", 200), ("frr_with_failures", 200), ("failure_rate", 300)):
        assert spans[name] == [0, pytest.approx(1 - 0.025 ** (1 / trials))]


def test_the_worst_pairs_are_a_manifest_that_train_takes(faces, tmp_path):
    scores, cache = faces
    told = pq.read_table(scores).to_pandas()
    # A threshold that calls half of the different pairs the same.
    threshold = float(told["probability"][told["true_label"] == 1].median())
    for name in ("worst.csv", "worst.parquet"):
        result = run(scores, "-o", tmp_path / "out", "--export-worst", 40, tmp_path / name, "--threshold", threshold)
        assert result.exit_code == 0, result.stderr
    frame = pd.read_csv(tmp_path / "worst.csv")
    pd.testing.assert_frame_equal(frame, pd.read_parquet(tmp_path / "worst.parquet"), check_dtype=False, rtol=1e-6)
    assert frame.columns.tolist()[:5] == ["image_a", "image_b", "label", "predicted_label", "probability"]
    wrong = (frame["label"] != frame["predicted_label"]).to_numpy()
    assert wrong.any()
    assert wrong.tolist() == sorted(wrong.tolist(), reverse=True)
    assert all(Path(path).is_file() for path in [*frame["image_a"], *frame["image_b"]])
    trained = batchverify.train(
        tmp_path / "worst.csv", FACES, tmp_path / "head.safetensors", cache=str(cache), quiet=True
    )
    assert trained.pairs["training"] == len(frame) == 40
    with pytest.raises(ManifestError, match="column 'probability' has the name of an output column"):
        batchverify.score(tmp_path / "worst.csv", tmp_path / "again.parquet", cache=str(cache), quiet=True)
    assert not (tmp_path / "again.parquet").exists()


def test_unknown_truth_is_blank_for_the_person_who_fills_it_in(tmp_path):
    columns = draw_columns(60, true_label=None, failed=0.3)
    path = write_scores(tmp_path / "s.parquet", columns)
    batchverify.evaluate(path, export_worst=(10, str(tmp_path / "worst.csv")))
    frame = pd.read_csv(tmp_path / "worst.csv")
    assert frame["label"].isna().all()
    gaps = np.abs(frame["probability"] - 0.5)
    assert gaps.is_monotonic_increasing
    nearest = np.sort(np.abs(np.array(columns["probability"].drop_null()) - 0.5))[:10]
    assert gaps.to_numpy() == pytest.approx(nearest, abs=1e-6)
    # The file lies where relative paths start.
    assert set(frame["image_a"]) <= set(columns["image_a"])


def test_senseless_options_of_the_api_are_refused(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(20))
    with pytest.raises(UsageError, match="--examples must lie between 0 and 100, got 101"):
        batchverify.evaluate(scores, examples=101)


def described() -> list[set[str]]:
    """The names in the first column of each table of the page."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    tables = re.split(r"\| --- \| --- \|\n", text)[1:]
    return [
        {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
        for table in (each.partition("\n\n")[0] for each in tables)
    ]


def test_every_key_and_figure_is_described(tmp_path):
    keys, figures = described()
    columns = draw_columns(120, fold=[each % 3 for each in range(120)])
    runs = [write_scores(tmp_path / f"{name}.parquet", columns) for name in ("new", "old")]
    suspects = (5, str(tmp_path / "suspects.csv"))
    found = batchverify.evaluate(runs[0], reference=runs[1], by="camera", draws=40, suspects=suspects).document
    # Of scores of other systems alone.
    assert {*found, "score"} == keys
    assert set(found["metrics"]) == set(NAMES) == figures
