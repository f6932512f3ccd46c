"""The search for a recipe: features, widths and regularisation by Ray Tune, on the dev set alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from batchverify.calibration import sigmoid
from batchverify.errors import BatchverifyError, UsageError
from batchverify.labelled import LabelledPairs
from batchverify.metrics import log_loss
from batchverify.options import TrainOptions
from batchverify.ray_engine import start_ray
from batchverify.recipe import Recipe

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

    Searches the algorithms that the options name, or all kinds where they name none. Trials run side by side
    on the Ray of `options.address`, or on one started here; the vectors go there once.
    """
    # Ray Tune's newer reporter prints boxes even when told to be silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    import ray
    from ray import tune as ray_tune

    ours = not ray.is_initialized()
    if ours:
        start_ray(options.address or os.environ.get("RAY_ADDRESS"), options.num_cpus, options.verbose)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainable = ray_tune.with_parameters(run_trial, train=train, dev=dev, options=options)
            tuner = ray_tune.Tuner(
                ray_tune.with_resources(trainable, {"cpu": 1}),
                param_space={"recipe": ray_tune.choice(search_space(options))},
                tune_config=ray_tune.TuneConfig(
                    metric="dev_loss",
                    mode="min",
                    num_samples=options.tune,
                    reuse_actors=True,
                    search_alg=ray_tune.search.BasicVariantGenerator(random_state=options.seed),
                ),
                run_config=ray_tune.RunConfig(storage_path=folder, verbose=int(options.verbose)),
            )
            grid: Any = tuner.fit()
            found = [
                Trial(each.config["recipe"], each.metrics["dev_loss"]) for each in grid if not each.error
            ]
            errors = [str(each.error) for each in grid if each.error]
    finally:
        if ours:
            ray.shutdown()
    if not found:
        raise BatchverifyError(f"--tune: every trial failed; the first: {errors[0].splitlines()[-1]}")
    trials = sorted(found, key=lambda each: each.dev_loss)
    return changed(options, trials[0].changes), trials


def run_trial(
    config: Mapping[str, Any], train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> Any:
    """One trial, on a worker: fit, and the balanced cross-entropy on dev."""
    import torch

    torch.set_num_threads(1)
    options = changed(options, config["recipe"])
    (text,) = options.algorithms
    fit = Recipe.parse(text).fit(train, dev, options)
    # Some hundred labelled pairs are soon told apart; all pairs of their images still tell recipes apart.
    pairs = dev.all_pairs()
    return {"dev_loss": log_loss(pairs.labels, sigmoid(fit.scores(pairs)), balanced=True)}


def changed(options: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    """The options with a trial's changes."""
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    return replace(options, features=None, **known)


def search_space(options: TrainOptions) -> list[dict[str, Any]]:
    """Every point of the search: changes of the options. Raises `UsageError` for an ensemble."""
    kinds = [text.partition(":")[0] for text in options.algorithms] or ["distance", "logistic", "network"]
    if len(options.algorithms) > 1:
        raise UsageError("--tune searches for one algorithm's settings: give one --algorithm or none")
    points: list[dict[str, Any]] = []
    if "distance" in kinds:
        points += [{"algorithms": [f"distance:{name}"]} for name in SCALARS]
    linear = [("logistic", TERMS), ("weighted-chi2", ("chi2",))]
    points += [
        {"algorithms": [f"{kind}:{name}"], "shrinkage": shrinkage}
        for kind, names in linear
        if kind in kinds
        for name in names
        for shrinkage in SHRINKAGES
    ]
    if "network" in kinds:
        points += [
            {
                "algorithms": [f"network:{name}"],
                "widths": list(widths),
                "dropout": dropout,
                "weight_decay": decay,
            }
            for name in TERMS
            for widths in WIDTHS
            for dropout in DROPOUTS
            for decay in DECAYS
        ]
    return points
