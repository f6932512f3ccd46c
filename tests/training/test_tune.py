"""The search for a spec: its space and draws, and trials on a real Ray with two CPUs."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from people import draw_people

from batchverify.errors import TrainingError, UsageError
from batchverify.evaluation.figures import balanced_log_loss
from batchverify.options import TrainOptions
from batchverify.storage.temporary import temporary_name
from batchverify.training.calibration import platt_scaling, sigmoid
from batchverify.training.fit import EstimatorSpec, centred_pairs
from batchverify.training.pairs import LabelledPairs
from batchverify.training.tune import draw_points, run_trial, search_space, tune, with_changes

OPTIONS = TrainOptions(tune=3, num_cpus=2, seed=5, epochs=3)


def pairs():
    return draw_people(30, 1, pairs=200), draw_people(12, 2, pairs=80, name="dev")


def unlearnable() -> tuple[LabelledPairs, LabelledPairs]:
    """Every pair appears with both labels."""
    train, dev = pairs()
    half = train.subset(np.arange(50))
    labels = np.concatenate([half.labels, 1 - half.labels])
    return replace(half, a=np.tile(half.a, 2), b=np.tile(half.b, 2), labels=labels), dev


def algorithms(points) -> set[str]:
    return {each["algorithms"][0].partition(":")[0] for each in points}


def names(points) -> set[str]:
    return {each["algorithms"][0] for each in points}


def test_the_default_space_has_three_algorithms_and_every_point_once():
    points = search_space(OPTIONS)
    assert algorithms(points) == {"distance", "logistic", "network"}
    assert len({json.dumps(each) for each in points}) == len(points)
    for point in points:
        options = with_changes(OPTIONS, point)
        assert str(EstimatorSpec.parse(*options.algorithms)) == point["algorithms"][0]


@pytest.mark.parametrize("algorithm", ["distance", "logistic", "weighted-chi2", "network"])
def test_only_the_named_algorithm_is_searched(algorithm):
    points = search_space(replace(OPTIONS, algorithms=(algorithm,)))
    assert algorithms(points) == {algorithm}
    assert len(points) == {"distance": 3, "logistic": 24, "weighted-chi2": 4, "network": 216}[algorithm]


def test_only_the_named_features_are_searched():
    assert names(search_space(replace(OPTIONS, algorithms=("logistic:sqdiff",)))) == {"logistic:sqdiff"}
    assert names(search_space(replace(OPTIONS, algorithms=("network",), features="concat"))) == {"network:concat"}
    assert names(search_space(replace(OPTIONS, features="chi2"))) == {"logistic:chi2", "network:chi2"}
    assert "distance:cosine" in names(search_space(replace(OPTIONS, features="cosine")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ("distance", "network")}, "--tune searches the settings of one algorithm"),
        ({"algorithms": ("forest",)}, "--algorithm must be one of distance, "),
        ({"algorithms": ("distance:chi2",)}, "--algorithm distance takes one of cosine"),
        ({"features": "chi3"}, "chi3"),
    ],
)
def test_invalid_searches(changes, message):
    with pytest.raises(UsageError, match=message):
        search_space(replace(OPTIONS, **changes))


def test_draws_are_different_points_that_alternate_between_algorithms():
    points = search_space(OPTIONS)
    few = draw_points(points, 7, seed=1)
    assert [next(iter(algorithms([each]))) for each in few[:6]] == ["distance", "logistic", "network"] * 2
    assert few == draw_points(points, 7, seed=1) != draw_points(points, 7, seed=2)
    every = draw_points(points, 10_000, seed=1)
    assert sorted(map(json.dumps, every)) == sorted(map(json.dumps, points))


def test_a_trial_is_the_balanced_loss_on_all_pairs_of_dev_images():
    plain_train, plain_dev = pairs()
    train, dev, _ = centred_pairs(plain_train, plain_dev, OPTIONS)
    point = {"algorithms": ("logistic:absdiff",), "shrinkage": 200.0}
    fit = EstimatorSpec.parse("logistic:absdiff").fit(train, dev, replace(OPTIONS, shrinkage=200.0))
    every = dev.all_pairs()
    slope, offset = platt_scaling(fit.scores(every), every.labels)
    expected = balanced_log_loss(every.labels, sigmoid(slope * fit.scores(every) + offset))
    assert len(every) == 48 * 47 / 2 > len(dev)
    result = run_trial({"changes": point}, plain_train, plain_dev, OPTIONS)
    assert result == {"dev_loss": pytest.approx(expected)}


def test_a_trial_whose_network_cannot_learn_returns_the_error():
    result = run_trial({"changes": {"algorithms": ("network:absdiff",)}}, *unlearnable(), OPTIONS)
    assert result["dev_loss"] == float("inf") and result["error"].startswith("overfit check:")


@pytest.mark.ray
class TestOnRay:
    """A search starts a Ray and ends it, unless one runs."""

    @pytest.mark.usefixtures("no_ray")
    def test_the_best_trial_is_the_smallest_loss_and_nothing_is_left(self, capfd):
        import ray

        of_a_killed_run = Path(tempfile.gettempdir(), temporary_name("batchverify-tune"))
        of_a_killed_run.mkdir()
        train, dev = pairs()
        options, trials = tune(train, dev, OPTIONS)
        assert not ray.is_initialized()
        assert not of_a_killed_run.exists()
        assert capfd.readouterr().out == ""
        losses = [each.pop("dev_loss") for each in trials]
        assert len(losses) == 3 and losses == sorted(losses) and losses[0] < losses[-1]
        assert algorithms(trials) == {"distance", "logistic", "network"}
        assert options.algorithms == tuple(trials[0]["algorithms"])
        assert {name: getattr(options, name) for name in trials[0]} == trials[0]
        # Running the best trial here gives the same loss.
        again = run_trial({"changes": trials[0]}, train, dev, OPTIONS)
        assert again["dev_loss"] == pytest.approx(losses[0], rel=1e-3)
        assert json.loads(json.dumps(trials))[0]["algorithms"] == list(options.algorithms)

    def test_a_ray_that_runs_is_used_and_left_running(self, running_ray):
        session = running_ray.get_runtime_context().get_node_id()
        with pytest.raises(TrainingError, match="--tune: every trial failed; the first error: overfit check"):
            tune(*unlearnable(), replace(OPTIONS, algorithms=("network",), tune=1))
        assert running_ray.is_initialized()
        assert running_ray.get_runtime_context().get_node_id() == session
