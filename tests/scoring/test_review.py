"""`--confidence` and `--review` on the drawn faces: columns, counts, refusals, resumed jobs, one pair, evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from half_done import FACES, SAMPLES, run, stopped

import batchverify
from batchverify.cli.app import main
from batchverify.embedding.backbone import find_spec
from batchverify.errors import ManifestError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.bounds import Tail
from batchverify.heads.head import Head, default_head
from batchverify.options import ScoreOptions

RATES = (0.05, 0.05)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    """The shipped head with bounds from made-up pairs, so that faces are left for review."""
    options = ScoreOptions()
    spec = find_spec(options.backbone, None)
    shipped = default_head(EmbeddingFingerprint.of(spec, options.settings(spec)))
    different, same = (
        np.linspace(0.002, 1, 400, dtype=np.float32),
        np.linspace(0, 0.95, 400, dtype=np.float32),
    )
    bounds = {
        "unit": "people",
        "different": Tail.of(different).to_json(),
        "same": Tail.of(same, highest=True).to_json(),
    }
    about = {**shipped.about, "thresholds": {**shipped.about["thresholds"], "bounds": bounds}}
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    path.write_bytes(replace(shipped, about=about).to_bytes())
    return str(path)


@pytest.fixture(scope="module")
def shipped(head, tmp_path_factory) -> str:
    """The same head without bounds, as older versions made it."""
    loaded = Head.load(head)
    thresholds = {name: value for name, value in loaded.about["thresholds"].items() if name != "bounds"}
    thresholds["far"] = [
        {name: value for name, value in entry.items() if name != "bounds"} for entry in thresholds["far"]
    ]
    path = tmp_path_factory.mktemp("old") / "head.safetensors"
    path.write_bytes(replace(loaded, about={**loaded.about, "thresholds": thresholds}).to_bytes())
    return str(path)


@pytest.fixture(scope="module")
def reviewed(head, cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reviewed") / "out.parquet"
    run(out, cache, head=head, review=RATES)
    return out


def record_of(path: Path) -> dict:
    return json.loads(pq.read_metadata(path).metadata[b"batchverify"])


def test_verdicts_follow_from_the_probabilities_and_nothing_else_changes(reviewed, head, cache, tmp_path):
    run(tmp_path / "plain.parquet", cache, head=head)
    plain, frame = pd.read_parquet(tmp_path / "plain.parquet"), pd.read_parquet(reviewed)
    assert list(frame.columns) == [*plain.columns, "verdict"]
    pd.testing.assert_frame_equal(frame.drop(columns="verdict"), plain)
    band = record_of(reviewed)["review"]
    low, high = np.float32(band["same_below"]), np.float32(band["different_from"])
    p = frame.probability.to_numpy()
    expected = np.where(p < low, "same", np.where(p >= high, "different", "review"))
    assert (frame.verdict[frame.probability.notna()] == expected[frame.probability.notna()]).all()
    assert "review" not in record_of(tmp_path / "plain.parquet")


@pytest.mark.parametrize("prior", [0.02, 0.9])
def test_another_base_rate_changes_no_verdict(reviewed, head, cache, tmp_path, prior):
    run(tmp_path / "o.parquet", cache, head=head, review=RATES, prior=prior)
    shifted, frame = pd.read_parquet(tmp_path / "o.parquet"), pd.read_parquet(reviewed)
    assert (shifted.probability != frame.probability).any()
    for column in ("verdict", "label"):
        pd.testing.assert_series_equal(shifted[column], frame[column])
    plain = Head.load(head).threshold(at_far=0.01)
    chosen = batchverify.evaluate(tmp_path / "o.parquet", at_far=0.01, head=head, draws=0).document
    # Calibrated on about as many same as different pairs.
    odds = plain / (1 - plain) * (1 - prior) / prior
    assert chosen["threshold"] == pytest.approx(odds / (1 + odds), rel=2e-3)
    band = record_of(tmp_path / "o.parquet")["review"]
    scored = shifted[shifted.probability.notna()]
    p = scored.probability.to_numpy()
    is_same, is_different = p < np.float32(band["same_below"]), p >= np.float32(band["different_from"])
    assert (scored.verdict == np.where(is_same, "same", np.where(is_different, "different", "review"))).all()


def test_the_record_and_the_summary_count_verdicts(reviewed, head, cache):
    summary, frame = run(reviewed, cache, head=head, review=RATES), pd.read_parquet(reviewed)
    counts = frame.verdict.value_counts().to_dict()
    for review in (summary.review, record_of(reviewed)["review"]):
        assert (review["far"], review["frr"]) == RATES
        assert {name: review[name] for name in counts} == counts
        assert sum(review[name] for name in ("same", "different", "review")) == frame.verdict.notna().sum()
    assert f"{counts.get('review', 0):,} for review" in dict(summary.lines())["verdicts"]


def test_a_row_without_a_score_has_no_verdict(head, cache):
    ada = str(SAMPLES / "faces" / "ada_1.jpg")
    pairs = pd.DataFrame({"image_a": [ada, ada], "image_b": [ada, "missing.jpg"]})
    frame = batchverify.score(pairs, head=head, cache=cache, review=RATES, quiet=True).to_pandas()
    assert frame.verdict.isna().tolist() == [False, True]
    assert frame.verdict[0] == "same"


@pytest.mark.parametrize("name", ["one.parquet", "folder"])
def test_a_job_that_stopped_ends_with_the_same_rows_and_counts(name, reviewed, head, cache, tmp_path):
    out = tmp_path / name
    stopped(out, cache, head=head, review=RATES)
    with pytest.raises(UsageError, match=r"review\.far"):
        run(out, cache, head=head, review=(0.2, 0.05))
    with pytest.raises(UsageError, match="review"):
        run(out, cache, head=head)
    summary = run(out, cache, head=head, review=RATES)
    assert summary.resumed_rows
    assert summary.to_arrow().equals(pq.read_table(reviewed))
    assert summary.review == record_of(reviewed)["review"]


def test_the_name_of_the_column_is_free_without_the_option(head, cache, tmp_path):
    table = pd.read_csv(FACES).head(2).assign(verdict="mine")
    table.to_csv(tmp_path / "pairs.csv", index=False)
    options = {"head": head, "cache": cache, "image_root": SAMPLES, "quiet": True}
    frame = batchverify.score(tmp_path / "pairs.csv", **options).to_pandas()
    assert frame.verdict.tolist() == ["mine", "mine"]
    with pytest.raises(ManifestError, match="'verdict' has the name of an output column of --review"):
        batchverify.score(tmp_path / "pairs.csv", review=RATES, **options)


def test_confidence_takes_the_promised_threshold(head, cache):
    options = {"head": head, "cache": cache, "image_root": SAMPLES, "quiet": True, "limit": 3}
    summary = batchverify.score(FACES, at_far=0.02, confidence=0.95, **options)
    stored = Head.load(head).about["thresholds"]["bounds"]["different"]
    assert summary.threshold == Tail.from_json(stored).bounded(0.02, 0.95)
    with pytest.raises(UsageError, match=r"takes 2,995 different pairs .* there were 400"):
        batchverify.score(FACES, at_far=0.001, confidence=0.95, **options)


def test_older_heads_score_as_before_and_promise_nothing(shipped, cache):
    options = {"head": shipped, "cache": cache, "image_root": SAMPLES, "quiet": True, "limit": 3}
    assert batchverify.score(FACES, at_far=0.01, **options).scored == 3
    for wanted in ({"at_far": 0.01, "confidence": 0.9}, {"review": RATES}):
        with pytest.raises(UsageError, match=r"holds no bounds.*fit it anew, or run `batchverify calibrate`"):
            batchverify.score(FACES, **wanted, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 0.9}, "give both"),
        ({"confidence": 1.0, "at_far": 0.1}, "0.5 to below 1"),
        ({"confidence": 0.9, "at_far": 0.0}, "between 0 and 1"),
        ({"review": (0.1,)}, "two rates"),
        ({"review": (0.1, 1.0)}, "between 0 and 1"),
        ({"review": ("a", 0.1)}, "between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ScoreOptions(**options)


def test_one_pair_gets_the_verdict_of_its_row(reviewed, head, cache):
    row = pd.read_parquet(reviewed).iloc[0]
    a, b = (str(SAMPLES / row[f"image_{side}"]) for side in "ab")
    prediction = batchverify.predict(a, b, head=head, cache=cache, review=RATES)
    assert prediction.to_json()["review"]["verdict"] == row.verdict
    assert f"Verdict of --review: {row.verdict}" in prediction.sentence()
    assert "review" not in batchverify.predict(a, b, head=head, cache=cache).to_json()


def test_evaluation_says_what_the_band_buys(reviewed, tmp_path):
    result = CliRunner().invoke(main, ["evaluate", str(reviewed), "-o", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    frame, review = pd.read_parquet(reviewed), json.loads((tmp_path / "metrics.json").read_text())["review"]
    different, same = frame.true_label == 1, frame.true_label == 0
    for name, rows in (("same", same), ("different", different)):
        assert review["truth"][name] == {
            verdict: int((rows & (frame.verdict == verdict)).sum()) for verdict in review["verdicts"]
        }
    assert review["figures"]["far"] == (different & (frame.verdict == "same")).sum() / different.sum()
    assert review["figures"]["frr"] == (same & (frame.verdict == "different")).sum() / same.sum()
    wrong, band = frame.label != frame.true_label, frame.verdict == "review"
    assert review["figures"]["error_all"] == wrong.mean()
    assert review["figures"]["error_review"] == (wrong[band].mean() if band.any() else None)
    assert review["share"] == band.mean()
    assert "for review" in result.stderr
    assert 'id="review"' in (tmp_path / "report.html").read_text()


def test_evaluation_takes_thresholds_of_the_runs_head(reviewed, head, shipped):
    chosen = batchverify.evaluate(reviewed, at_far=0.02, confidence=0.95).document["threshold"]
    assert chosen == Head.load(head).threshold(at_far=0.02, confidence=0.95)
    assert batchverify.evaluate(reviewed, at_far=0.01, head=head).document["threshold"] == Head.load(head).threshold(
        at_far=0.01
    )
    with pytest.raises(UsageError, match="not the head that scored"):
        batchverify.evaluate(reviewed, at_far=0.01, head=shipped)
    with pytest.raises(UsageError, match="exclude each other"):
        batchverify.evaluate(reviewed, at_far=0.01, threshold=0.5)
