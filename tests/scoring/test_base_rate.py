"""`--prior`: shifted probabilities in outputs and predictions, verdicts that stay, estimates that are kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from half_done import FACES, PART, SAMPLES, job_folder, run, stopped
from run_records import read_record
from s3_server import s3_client, s3_options, s3_server

import batchverify
from batchverify.errors import UsageError
from batchverify.heads.drift import histograms
from batchverify.heads.head import Head, default_head
from batchverify.heads.prior import BaseRate, fitted_share
from batchverify.options import ScoreOptions
from batchverify.scoring.job import Job


def record_of(out: Path) -> dict[str, Any]:
    return read_record(str(out)) if out.suffix else json.loads((out / "_SUCCESS").read_text())


def probabilities(summary) -> np.ndarray:
    return summary.to_arrow().column("probability").to_numpy()


def shipped() -> Head:
    return default_head(Job.open(FACES, ScoreOptions(image_root=str(SAMPLES))).fingerprint)


def test_probabilities_move_and_verdicts_stay(out, cache, tmp_path):
    plain = run(tmp_path / "plain.parquet", cache)
    shifted = run(out, cache, prior=0.05)
    assert "prior" not in record_of(tmp_path / "plain.parquet")
    fitted = fitted_share(shipped().about)
    rate = BaseRate(0.05, fitted, (plain.threshold,))
    assert (probabilities(shifted) == rate(probabilities(plain))).all()
    assert shifted.threshold == rate.threshold(plain.threshold) > plain.threshold
    assert shifted.to_arrow().column("label").equals(plain.to_arrow().column("label"))
    assert shifted.to_arrow().column("similarity").equals(plain.to_arrow().column("similarity"))
    record = record_of(out)
    assert record["prior"] == {"share": 0.05, "source": "given", "calibrated_for": fitted}
    assert record["threshold"] == shifted.threshold
    assert ("share of same pairs", "0.0500, given") in shifted.lines()
    again = run(out, cache, prior=0.05)
    assert (again.resumed_rows, again.prior) == (again.rows, shifted.prior)


def test_a_threshold_of_the_head_moves_and_one_of_the_user_does_not(cache):
    options = {"image_root": SAMPLES, "cache": cache, "quiet": True}
    plain = batchverify.score(FACES, at_far=0.01, **options)
    shifted = batchverify.score(FACES, at_far=0.01, prior=0.9, **options)
    assert shifted.threshold < plain.threshold
    assert shifted.different == plain.different
    own = batchverify.score(FACES, threshold=0.3, prior=0.9, **options)
    assert own.threshold == 0.3
    assert own.different == (probabilities(own) >= np.float32(0.3)).sum()


def test_an_estimate_is_made_once_and_kept(out, cache, tmp_path):
    undisturbed = run(tmp_path / "other.parquet", cache, prior="estimate")
    low, high = undisturbed.prior["interval"]
    truth = undisturbed.to_arrow().column("true_label").to_numpy(zero_copy_only=False)
    assert low <= undisturbed.prior["share"] <= high
    assert undisturbed.prior["share"] == pytest.approx(np.mean(truth == 0), abs=0.1)
    assert undisturbed.prior["source"] == "estimated"
    stopped(out, cache, prior="estimate")
    state = json.loads((job_folder(out) / "job.json").read_text())
    assert state["prior"] == undisturbed.prior
    resumed = run(out, cache, prior="estimate")
    assert resumed.resumed_rows == 2 * PART
    assert resumed.to_arrow().equals(undisturbed.to_arrow())
    assert record_of(out)["prior"] == undisturbed.prior


def test_a_resumed_run_takes_the_number_that_was_kept(tmp_path, cache):
    out = tmp_path / "out"
    stopped(out, cache, prior="estimate")
    state = job_folder(out) / "job.json"
    document = json.loads(state.read_text())
    document["prior"]["share"] = 0.25
    state.write_text(json.dumps(document))
    assert run(out, cache, prior="estimate").prior["share"] == 0.25
    document["prior"]["share"] = "many"
    state.parent.mkdir()
    state.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="damaged"):
        run(tmp_path / "out", cache, prior=0.3)


@pytest.mark.parametrize("fits", [True, False])
def test_scores_unlike_those_of_the_head_give_no_estimate(tmp_path, cache, fits):
    plain = run(tmp_path / "plain.parquet", cache)
    truth = plain.to_arrow().column("true_label").to_numpy(zero_copy_only=False)
    own = probabilities(plain) if fits else np.where(truth == 1, 0.55, 0.45)
    head = shipped()
    counts = histograms(np.tile(truth, 20), np.tile(own, 20))
    head = replace(head, about={**head.about, "log_odds": counts})
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    own_head = str(tmp_path / "head.safetensors")
    if fits:
        assert run(tmp_path / "out", cache, head=own_head, prior="estimate").prior["drift"]["verdict"] == "fits"
        return
    with pytest.raises(UsageError, match="unlike those"):
        run(tmp_path / "out", cache, head=own_head, prior="estimate")
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", cache, head=own_head, prior=0.4).prior["share"] == 0.4


@pytest.mark.parametrize(("first", "then"), [(0.1, 0.2), (None, 0.2), (0.2, None), (0.2, "estimate")])
def test_another_share_is_another_job(tmp_path, cache, first, then):
    out = tmp_path / "out.parquet"
    run(out, cache, prior=first)
    with pytest.raises(UsageError, match="prior"):
        run(out, cache, prior=then)


def test_the_threshold_of_the_user_and_that_of_the_head_are_two_jobs(tmp_path, cache):
    out = tmp_path / "out.parquet"
    plain = run(tmp_path / "plain.parquet", cache)
    run(out, cache, prior=0.2)
    with pytest.raises(UsageError, match="threshold_moves"):
        run(out, cache, prior=0.2, threshold=plain.threshold)


def test_people_are_the_units_of_an_estimate(cache, tmp_path):
    head = shipped()
    # Drawn faces are unlike the photographs that its histograms are of.
    about = {name: value for name, value in head.about.items() if name != "log_odds"}
    path = tmp_path / "head.safetensors"
    path.write_bytes(replace(head, about=about).to_bytes())
    options = {"image_root": SAMPLES, "cache": cache, "quiet": True, "prior": "estimate", "head": str(path)}
    named = pd.read_csv(FACES)
    assert batchverify.score(named, **options).prior["unit"] == "identities"
    unnamed = named.drop(columns=["person_a", "person_b"])
    assert batchverify.score(unnamed, **options).prior["unit"] == "images"


def test_a_prediction_is_that_of_score(cache):
    scored = batchverify.score(FACES, image_root=SAMPLES, cache=cache, quiet=True, limit=1, prior=0.01)
    row = scored.to_arrow().to_pylist()[0]
    pair = [SAMPLES / row[name] for name in ("image_a", "image_b")]
    found = batchverify.predict(*pair, cache=cache, prior=0.01)
    assert (found.probability, found.label) == (row["probability"], row["label"])
    assert found.threshold == scored.threshold
    with pytest.raises(UsageError, match="one pair"):
        batchverify.predict(*pair, cache=cache, prior="estimate")


@pytest.mark.parametrize("prior", [0, 1, -0.5, "half", "nan", [0.5]])
def test_no_share_of_none_or_all(prior):
    with pytest.raises(UsageError, match="--prior must be a share"):
        ScoreOptions(prior=prior)


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_rows_under_ray_are_the_same(tmp_path, cache):
    here = run(tmp_path / "here.parquet", cache, prior="estimate")
    there = run(tmp_path / "there.parquet", cache, prior="estimate", engine="ray")
    assert there.prior == here.prior
    assert there.to_arrow().equals(here.to_arrow())


def test_an_output_in_an_object_store_has_the_same_rows_and_record(tmp_path, cache):
    here = run(tmp_path / "here.parquet", cache, prior="estimate")
    with s3_server() as address:
        s3_client(address).create_bucket(Bucket="rates")
        out = f"s3://rates/out.parquet{s3_options(address)}"
        options = {"cache": cache, "image_root": SAMPLES, "part_rows": PART, "quiet": True}
        there = batchverify.score(FACES, out, prior="estimate", **options)
        assert there.prior == here.prior
        assert there.to_arrow().equals(here.to_arrow())
        assert batchverify.score(FACES, out, prior="estimate", **options).resumed_rows == there.rows


def test_a_head_of_several_backbones_is_shifted_as_others_are(cache):
    options = {"image_root": SAMPLES, "cache": cache, "quiet": True, "backbone": "vggface2+compact"}
    plain = batchverify.score(FACES, **options)
    shifted = batchverify.score(FACES, prior=0.05, **options)
    rate = BaseRate(0.05, shifted.prior["calibrated_for"], (plain.threshold,))
    assert (probabilities(shifted) == rate(probabilities(plain))).all()
    assert shifted.to_arrow().column("label").equals(plain.to_arrow().column("label"))
