"""What a head's member is fitted by: an algorithm on features, as `--algorithm` names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from batchverify.errors import UsageError
from batchverify.heads.features import Features
from batchverify.heads.scorer import Member
from batchverify.labelled import LabelledPairs
from batchverify.linear import fit_linear, log_loss, squared_hinge
from batchverify.network import Epoch, NetworkFit, NetworkSettings, fit_network
from batchverify.options import ALGORITHMS, DEFAULT_ALGORITHM, TrainOptions

DEFAULT_FEATURES = {"distance": "chi2sum", "logistic": "chi2", "weighted-chi2": "chi2", "network": "absdiff"}
PAPER_FEATURES = ("chi2", "chi2raw")

Report = Callable[[str, Epoch], None]


def silent(name: str, epoch: Epoch) -> None:
    """A report of epochs that tells nobody."""


@dataclass(frozen=True)
class Fit:
    """What one recipe came to: its members (several for snapshots) count as one score, their mean."""

    members: tuple[Member, ...]
    network: NetworkFit | None = None

    @torch.inference_mode()
    def scores(self, pairs: LabelledPairs) -> np.ndarray:
        """(N,) float64."""
        # Filled in place: small results kept between large blocks would leave the heap full of holes.
        scores, done = np.zeros(len(pairs)), 0
        for a, b, _ in pairs.blocks():
            logits = torch.stack([each.logits(a, b) for each in self.members]).mean(0)
            scores[done : done + len(a)] = logits.numpy()
            done += len(a)
        return scores


@dataclass(frozen=True)
class Recipe:
    """One member to be fitted: an algorithm of `options.ALGORITHMS` on features."""

    algorithm: str
    features: Features

    @classmethod
    def parse(cls, text: str, features: str | None = None) -> Recipe:
        """`NAME` or `NAME:FEATURES`; `features` stands in where none are named, else the algorithm's own.

        Raises `UsageError` for an unknown name and for features that the algorithm does not take.
        """
        name, _, own = text.partition(":")
        if name not in ALGORITHMS:
            raise UsageError(f"--algorithm must be one of {', '.join(ALGORITHMS)}, got '{name}'")
        recipe = cls(name, Features.parse(own or features or DEFAULT_FEATURES[name]))
        if name == "distance" and not recipe.features.scalar:
            raise UsageError(
                "--algorithm distance takes one number a pair (cosine, euclidean or chi2sum), "
                f"got '{recipe.features}'"
            )
        if name == "weighted-chi2" and str(recipe.features) not in PAPER_FEATURES:
            raise UsageError(
                f"--algorithm weighted-chi2 takes {' or '.join(PAPER_FEATURES)}, got '{recipe.features}'"
            )
        return recipe

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.features}"

    def fit(
        self,
        train: LabelledPairs,
        dev: LabelledPairs,
        options: TrainOptions,
        report: Report = silent,
        *,
        checked_lr: float | None = None,
    ) -> Fit:
        """Fit to `train`; dev stops networks.

        checked_lr: the rate for a network of some of the pairs, when all of them have passed its checks.
        """
        if self.algorithm != "network":
            loss = squared_hinge if self.algorithm == "weighted-chi2" else log_loss
            member = fit_linear(
                train, self.features, algorithm=self.algorithm, shrinkage=options.shrinkage, loss=loss
            )
            return Fit((member,))
        settings = network_settings(options)
        if checked_lr is not None:
            settings = replace(settings, max_lr=checked_lr)
        network = fit_network(
            train,
            dev,
            self.features,
            settings,
            lambda epoch: report(str(self), epoch),
            checked=checked_lr is not None,
        )
        return Fit(network.members, network)


def recipes(options: TrainOptions) -> list[Recipe]:
    """The members that the options ask for. Raises `UsageError` where one is asked for twice."""
    found = [Recipe.parse(text, options.features) for text in options.algorithms or (DEFAULT_ALGORITHM,)]
    for place, recipe in enumerate(found):
        if recipe in found[:place]:
            raise UsageError(f"--algorithm {recipe} stands there twice: both members would be the same")
    return found


def network_settings(options: TrainOptions) -> NetworkSettings:
    """What the options say about networks."""
    return NetworkSettings(**{name: getattr(options, name) for name in NetworkSettings.__dataclass_fields__})
