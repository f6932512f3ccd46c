"""`evaluate` without labels: the share of same pairs, the error rates to expect, and drift."""

from dataclasses import replace

import numpy as np
import pytest
from head_samples import ABOUT, make_head
from score_tables import draw_columns, write_scores

from batchverify.evaluation.evaluate import evaluate
from batchverify.heads.drift import histograms
from batchverify.heads.prior import shift


def calibrated(pairs: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities that are right on balanced pairs."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(pairs) >= share).astype(int)
    return labels, 1 / (1 + np.exp(-rng.normal(10 * labels - 5, 10**0.5)))


def unlabelled(pairs: int, probability: np.ndarray) -> dict:
    """Columns of scores without a truth."""
    given = probability.astype(np.float32)
    return draw_columns(pairs, people=2000, failed=0, probability=given, true_label=None)


def test_share_and_error_rates_are_those_of_the_hidden_labels(tmp_path):
    labels, probability = calibrated(6000, 0.1)
    done = evaluate(write_scores(tmp_path / "a.parquet", unlabelled(6000, probability)), tmp_path / "out")
    found = done.document["base_rate"]
    called = probability >= 0.5
    truth = {
        "share": np.mean(labels == 0),
        "far": np.mean(~called[labels == 1]),
        "frr": np.mean(called[labels == 0]),
    }
    for name, value in truth.items():
        low, high = found["intervals"][name]
        assert low < found["estimates"][name] < high
        assert found["estimates"][name] == pytest.approx(value, abs=0.012)
    assert found["drift"]["verdict"] == "not checked"
    assert (found["probabilities_for"], found["pairs"], found["unit"]) == (0.5, 6000, "identities")
    text = dict(done.lines())
    assert "estimated without labels" in text["share of same pairs"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Without labels" in page
    assert "expected FRR" in page


def test_shifted_scores_give_the_same_estimates(tmp_path):
    _, probability = calibrated(3000, 0.3)
    plain = evaluate(write_scores(tmp_path / "a.parquet", unlabelled(3000, probability)), draws=0)
    moved = shift(probability, 0.05)
    prior = {"share": 0.05, "source": "given"}
    path = write_scores(tmp_path / "b.parquet", unlabelled(3000, moved), threshold=0.95, prior=prior)
    shifted = evaluate(path, draws=0).document["base_rate"]
    assert shifted["probabilities_for"] == 0.05
    assert shifted["estimates"] == pytest.approx(plain.document["base_rate"]["estimates"], abs=1e-3)
    assert shifted["intervals"] == {}


def test_of_labelled_scores_likelihood_ratios_do_not_change_with_the_prior(tmp_path):
    labels, probability = calibrated(2000, 0.4)
    found = []
    for name, p, record in (
        ("a", probability, {}),
        ("b", shift(probability, 0.02), {"prior": {"share": 0.02, "source": "given"}}),
    ):
        columns = draw_columns(2000, failed=0, probability=p.astype(np.float32), true_label=labels)
        path = write_scores(tmp_path / f"{name}.parquet", columns, **record)
        found.append(evaluate(path, draws=0).document["metrics"])
    for name in ("cllr", "min_cllr"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5), name
    # Shifted probabilities near 1 lose digits as float32.
    assert found[1]["d_prime"] == pytest.approx(found[0]["d_prime"], rel=0.01)
    assert found[1]["log_loss"] > 2 * found[0]["log_loss"]


def test_the_share_of_the_head_is_taken_out_of_likelihood_ratios(tmp_path):
    """A head that was calibrated where one pair in ten is same."""
    labels, probability = calibrated(2000, 0.4)
    about = {**ABOUT, "calibration": {**ABOUT.get("calibration", {}), "same_share": 0.1}}
    head = replace(make_head(), about=about)
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    record = {"head": head.digest, "options": {"head": str(tmp_path / "head.safetensors")}}
    columns = draw_columns(2000, failed=0, true_label=labels, probability=probability.astype(np.float32))
    plain = evaluate(write_scores(tmp_path / "a.parquet", columns), draws=0).document["metrics"]
    columns["probability"] = shift(probability, 0.1).astype(np.float32)
    tenth = evaluate(write_scores(tmp_path / "b.parquet", columns, **record), draws=0).document["metrics"]
    assert tenth["cllr"] == pytest.approx(plain["cllr"], abs=1e-5)


@pytest.mark.parametrize("closer", [1.0, 0.5])
def test_drifted_scores_give_no_estimate(tmp_path, closer):
    kept = histograms(*calibrated(2000, 0.5))
    head = replace(make_head(), about={**ABOUT, "log_odds": kept})
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    _, probability = calibrated(2000, 0.3, 1)
    odds = closer * np.log(probability / (1 - probability))
    record = {"head": head.digest, "options": {"head": str(tmp_path / "head.safetensors")}}
    columns = unlabelled(2000, 1 / (1 + np.exp(-odds)))
    done = evaluate(write_scores(tmp_path / "a.parquet", columns, **record), draws=0)
    found = done.document["base_rate"]
    if closer == 1:
        assert found["drift"]["verdict"] == "fits"
        assert found["estimates"]["share"] == pytest.approx(0.3, abs=0.03)
    else:
        assert found["drift"]["verdict"] == "drift"
        assert found["estimates"] == {"share": None, "far": None, "frr": None}
        assert "share of same pairs" not in dict(done.lines())


def test_labels_need_no_estimates(tmp_path):
    columns = draw_columns(200)
    assert evaluate(write_scores(tmp_path / "a.parquet", columns), draws=0).document["base_rate"] is None


@pytest.mark.parametrize("pairs", [1, 2, 12])
def test_few_pairs_without_labels(tmp_path, pairs):
    columns = unlabelled(pairs, np.full(pairs, 0.01))
    found = evaluate(write_scores(tmp_path / "a.parquet", columns), tmp_path / "out").document["base_rate"]
    # Nobody is expected to be different, so how often that is overlooked is not known.
    assert found["estimates"]["far"] is None
    assert all(low < high for low, high in found["intervals"].values())
