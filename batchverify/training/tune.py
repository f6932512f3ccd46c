"""The search for a spec: features, widths and regularisation by Ray Tune, on the dev set alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from batchverify.engine.ray.cluster import start_ray
from batchverify.errors import BatchverifyError, TrainingError, UsageError
from batchverify.evaluation.figures import log_loss
from batchverify.heads.features import Features
from batchverify.options import ALGORITHMS, TrainOptions
from batchverify.training.calibration import platt_scaling, sigmoid
from batchverify.training.fit import EstimatorSpec
from batchverify.training.pairs import LabelledPairs

SCALARS = ("cosine", "euclidean", "chi2sum")
TERMS = ("absdiff", "sqdiff", "product", "chi2", "absdiff+product", "chi2+product")
WIDTHS = ((64,), (256, 32), (640, 64), (1024, 128))
SHRINKAGES = (20.0, 200.0, 2000.0, 20000.0)
DROPOUTS = (0.0, 0.3, 0.5)
DECAYS = (0.01, 0.1, 0.3)


@dataclass(frozen=True)
class Trial:
    """One trial: what it changed of the options, and its loss on all pairs of dev images."""

    changes: Mapping[str, Any]
    dev_loss: float

    def to_json(self) -> dict[str, Any]:
        """For the training record."""
        return {**self.changes, "dev_loss": self.dev_loss}


def tune(train: LabelledPairs, dev: LabelledPairs, options: TrainOptions) -> tuple[TrainOptions, list[Trial]]:
    """The options with the smallest loss on dev among `options.tune` trials, and all trials, best first.

    Tries points of `search_space`, each once. Trials run side by side on the Ray of `options.address`, or on
    one started here; the vectors go there once. Raises `UsageError` as `search_space` does, `TrainingError`
    where no trial came to anything.
    """
    points = drawn(search_space(options), options.tune, options.seed)
    # Ray Tune's newer reporter prints boxes even when told to be silent, and its own handler of Ctrl-C would
    # end the search alone, not the command.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    import ray

    ours = not ray.is_initialized()
    if ours:
        start_ray(options.address or os.environ.get("RAY_ADDRESS"), options.num_cpus, options.verbose)
    try:
        results = _run_trials(points, train, dev, options)
    finally:
        if ours:
            ray.shutdown()
    errors = [each["error"] for each in results if "error" in each]
    found = [Trial(each["config"], each["dev_loss"]) for each in results if "error" not in each]
    if not found:
        raise TrainingError(f"--tune: every trial failed; the first: {errors[0]}")
    trials = sorted(found, key=lambda each: each.dev_loss)
    return changed(options, trials[0].changes), trials


def _run_trials(
    points: list[dict[str, Any]], train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> list[dict[str, Any]]:
    """`config` and either `dev_loss` or `error` of every point. Raises `BatchverifyError` where Ray fails."""
    from ray import tune as ray_tune

    with tempfile.TemporaryDirectory() as folder:
        trainable = ray_tune.with_parameters(run_trial, train=train, dev=dev, options=options)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"cpu": 1}),
            param_space={"recipe": ray_tune.grid_search(points)},
            tune_config=ray_tune.TuneConfig(metric="dev_loss", mode="min", reuse_actors=True),
            run_config=ray_tune.RunConfig(storage_path=folder, verbose=int(options.verbose)),
        )
        grid: Any = tuner.fit()
        for each in grid:
            if each.error:
                raise BatchverifyError(f"--tune: a trial broke: {str(each.error).splitlines()[-1]}")
        return [{**each.metrics, "config": each.config["recipe"]} for each in grid]


def run_trial(
    config: Mapping[str, Any], train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> dict[str, Any]:
    """One trial, on a worker: fit, and the balanced cross-entropy on dev; or why a network cannot learn."""
    import torch

    torch.set_num_threads(1)
    options = changed(options, config["recipe"])
    (text,) = options.algorithms
    try:
        fit = EstimatorSpec.parse(text).fit(train, dev, options)
    except TrainingError as exc:
        return {"dev_loss": float("inf"), "error": str(exc)}
    # Some hundred labelled pairs are soon told apart; all pairs of their images still tell recipes apart.
    pairs = dev.all_pairs()
    pairs = pairs if pairs.labels.any() and not pairs.labels.all() else dev
    # Calibrated first, as the head will be: the scores of some algorithms are no logits.
    scores = fit.scores(pairs)
    slope, offset = platt_scaling(scores, pairs.labels)
    return {"dev_loss": log_loss(pairs.labels, sigmoid(slope * scores + offset), balanced=True)}


def changed(options: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    """The options with a trial's changes."""
    return replace(options, features=None, **changes)


def drawn(points: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """At most so many different points, the algorithms in turn: one has three points, another two hundred."""
    rng = np.random.default_rng(seed)
    mixed = [points[place] for place in rng.permutation(len(points))]
    kinds = [[each for each in mixed if _kind(each) == kind] for kind in ALGORITHMS]
    turns = [each for turn in zip_longest(*kinds) for each in turn if each is not None]
    return turns[:count]


def _kind(point: Mapping[str, Any]) -> str:
    return str(point["algorithms"][0].partition(":")[0])


def check_installed() -> None:
    """Raise `UsageError` where Ray's own core is there and what Ray Tune needs besides is not."""
    try:
        import ray.tune  # noqa: F401
    except ImportError as exc:
        raise UsageError("--tune needs Ray Tune: pip install 'ray[tune]'") from exc


def search_space(options: TrainOptions) -> list[dict[str, Any]]:
    """Every point of the search: changes of the options.

    Where the options name an algorithm or features, the others are not searched. Raises `UsageError` for an
    ensemble and for names that `EstimatorSpec.parse` refuses.
    """
    if len(options.algorithms) > 1:
        raise UsageError("--tune searches for one algorithm's settings: give one --algorithm or none")
    named = options.algorithms[0] if options.algorithms else ""
    kind, _, own = named.partition(":")
    features = own or options.features
    if named or features:
        # Networks take all features: without an algorithm, the features alone are looked at.
        EstimatorSpec.parse(named or "network", features)
    points = [each for each in _all_points(features) if _kind(each) == kind or not named]
    if named:
        return points
    return [each for each in points if _kind(each) != "weighted-chi2" and _taken(each)]


def _taken(point: Mapping[str, Any]) -> bool:
    """Whether the algorithm takes the features: distances take one number a pair."""
    kind, _, features = point["algorithms"][0].partition(":")
    return kind != "distance" or Features.parse(features).scalar


def _all_points(features: str | None) -> list[dict[str, Any]]:
    """Of all algorithms, with the features given or else with those that suit them."""
    only = (features,) if features else None
    points: list[dict[str, Any]] = [{"algorithms": (f"distance:{name}",)} for name in only or SCALARS]
    points += [
        {"algorithms": (f"{kind}:{name}",), "shrinkage": shrinkage}
        for kind, names in (("logistic", TERMS), ("weighted-chi2", ("chi2",)))
        for name in only or names
        for shrinkage in SHRINKAGES
    ]
    points += [
        {
            "algorithms": (f"network:{name}",),
            "widths": widths,
            "dropout": dropout,
            "weight_decay": decay,
        }
        for name in only or TERMS
        for widths in WIDTHS
        for dropout in DROPOUTS
        for decay in DECAYS
    ]
    return points
