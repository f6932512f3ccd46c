"""The search for a spec with Ray Tune: features, widths and regularisation, judged on dev alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from batchverify.engine.ray.start import running_ray
from batchverify.errors import BatchverifyError, TrainingError, UsageError
from batchverify.evaluation.figures import balanced_log_loss
from batchverify.heads.features import Features
from batchverify.options import ALGORITHMS, TrainOptions
from batchverify.storage.temporary import temporary_folder
from batchverify.training.calibration import platt_scaling, sigmoid
from batchverify.training.fit import EstimatorSpec, centred_pairs
from batchverify.training.pairs import LabelledPairs

SCALARS = ("cosine", "euclidean", "chi2sum")
TERMS = ("absdiff", "sqdiff", "product", "chi2", "absdiff+product", "chi2+product")
WIDTHS = ((64,), (256, 32), (640, 64), (1024, 128))
SHRINKAGES = (20.0, 200.0, 2000.0, 20000.0)
DROPOUTS = (0.0, 0.3, 0.5)
DECAYS = (0.01, 0.1, 0.3)


def tune(
    train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> tuple[TrainOptions, list[dict[str, Any]]]:
    """The options with the smallest loss on dev among `options.tune` trials, and all trials, best first.

    Of a trial the options that it changed, and its `dev_loss` on all pairs of dev images.

    The trials are different points of `search_space`. They run in parallel on the Ray at `options.address` or a
    local one, to which the vectors are sent once. Raises what `search_space` raises, and `TrainingError` if all
    trials fail.
    """
    points = draw_points(search_space(options), options.tune, options.seed)
    # Ray Tune's newer reporter prints even when told to be silent. Its handler of Ctrl-C would end only the search,
    # not the command.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    with running_ray(options.address, options.num_cpus, options.verbose):
        results = _run_trials(points, train, dev, options)
    learnt = [(changes, result["dev_loss"]) for changes, result in results if "error" not in result]
    if not learnt:
        _, first = results[0]
        raise TrainingError(f"--tune: every trial failed; the first error: {first['error']}")
    learnt.sort(key=lambda trial: trial[1])
    trials = [{**changes, "dev_loss": dev_loss} for changes, dev_loss in learnt]
    return with_changes(options, learnt[0][0]), trials


def check_installed() -> None:
    """Raise `UsageError` if Ray Tune's own requirements are not installed."""
    try:
        import ray.tune  # noqa: F401
    except ImportError as exc:
        raise UsageError("--tune needs Ray Tune: pip install 'ray[tune]'") from exc


def search_space(options: TrainOptions) -> list[dict[str, Any]]:
    """All points of the search: changes of the options.

    If the options name an algorithm or features, only these are searched. Raises `UsageError` for an ensemble and for
    names that `EstimatorSpec.parse` refuses.
    """
    if len(options.algorithms) > 1:
        raise UsageError("--tune searches the settings of one algorithm: give one --algorithm or none")
    spec = options.algorithms[0] if options.algorithms else ""
    algorithm, _, own_features = spec.partition(":")
    features = own_features or options.features
    if spec or features:
        # Networks take all features: without an algorithm, this checks only the features.
        EstimatorSpec.parse(spec or "network", features)
    points = _all_points(features)
    if spec:
        return [point for point in points if _algorithm(point) == algorithm]
    return [point for point in points if _algorithm(point) != "weighted-chi2"]


def _run_trials(
    points: list[dict[str, Any]], train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every point with the result of `run_trial`. Raises `BatchverifyError` if a trial crashes."""
    from ray import tune as ray_tune

    with temporary_folder("batchverify-tune") as folder:
        trainable = ray_tune.with_parameters(run_trial, train=train, dev=dev, options=options)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"cpu": 1}),
            param_space={"changes": ray_tune.grid_search(points)},
            tune_config=ray_tune.TuneConfig(metric="dev_loss", mode="min", reuse_actors=True),
            run_config=ray_tune.RunConfig(storage_path=str(folder), verbose=int(options.verbose)),
        )
        grid: Any = tuner.fit()
        for result in grid:
            if result.error:
                raise BatchverifyError(f"--tune: a trial crashed: {str(result.error).splitlines()[-1]}")
        return [(result.config["changes"], result.metrics) for result in grid]


def run_trial(
    config: Mapping[str, Any], train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> dict[str, Any]:
    """Run a trial on a worker: fit, then measure the balanced cross-entropy on dev.

    Returns `dev_loss`, and `error` if a network cannot learn.
    """
    import torch

    torch.set_num_threads(1)
    options = with_changes(options, config["changes"])
    train, dev, _ = centred_pairs(train, dev, options)
    (text,) = options.algorithms
    try:
        fit = EstimatorSpec.parse(text).fit(train, dev, options)
    except TrainingError as exc:
        return {"dev_loss": float("inf"), "error": str(exc)}
    # A few hundred labelled pairs are soon separated perfectly; all pairs of their images still differ by spec.
    pairs = dev.all_pairs()
    pairs = pairs if pairs.labels.any() and not pairs.labels.all() else dev
    # Calibrated first, as the head will be: the scores of some algorithms are not logits.
    scores = fit.scores(pairs)
    slope, offset = platt_scaling(scores, pairs.labels)
    return {"dev_loss": balanced_log_loss(pairs.labels, sigmoid(slope * scores + offset))}


def with_changes(options: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    """The options with a trial's changes."""
    return replace(options, features=None, **changes)


def draw_points(points: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """A random draw of at most `count` points that alternates between algorithms, whose points differ in number."""
    rng = np.random.default_rng(seed)
    shuffled = [points[index] for index in rng.permutation(len(points))]
    by_algorithm = [[point for point in shuffled if _algorithm(point) == name] for name in ALGORITHMS]
    return [point for turn in zip_longest(*by_algorithm) for point in turn if point is not None][:count]


def _algorithm(point: Mapping[str, Any]) -> str:
    return str(point["algorithms"][0].partition(":")[0])


def _all_points(features: str | None) -> list[dict[str, Any]]:
    """The points of all algorithms, with the given features or else with suitable ones."""
    only = (features,) if features else None
    points: list[dict[str, Any]] = [
        {"algorithms": (f"distance:{name}",)} for name in only or SCALARS if Features.parse(name).scalar
    ]
    points += [
        {"algorithms": (f"{algorithm}:{name}",), "shrinkage": shrinkage}
        for algorithm, names in (("logistic", TERMS), ("weighted-chi2", ("chi2",)))
        for name in only or names
        for shrinkage in SHRINKAGES
    ]
    points += [
        {"algorithms": (f"network:{name}",), "widths": widths, "dropout": dropout, "weight_decay": decay}
        for name in only or TERMS
        for widths in WIDTHS
        for dropout in DROPOUTS
        for decay in DECAYS
    ]
    return points
