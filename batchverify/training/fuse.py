"""Fits the head of several backbones: a head for each, and a calibration of the sum of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batchverify.evaluation.figures import Metrics, measure
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.fused_head import FusedHead, all_combinations, combination_key
from batchverify.heads.head import Head
from batchverify.options import TrainOptions
from batchverify.training.calibration import METHODS, sigmoid
from batchverify.training.fit import (
    FittedHead,
    Report,
    estimator_specs,
    fit_head,
    measured_about,
    probabilities,
    trusted_out_of_fold,
)
from batchverify.training.guarantees import HeldOut, UnseenPairs
from batchverify.training.network import Epoch, NetworkFit
from batchverify.training.pairs import LabelledPairs
from batchverify.version import __version__


@dataclass(frozen=True)
class FittedHeads:
    """The head of one backbone or of several, and its networks by spec and, with several, by backbone."""

    head: Head | FusedHead
    networks: Mapping[str, NetworkFit] = field(default_factory=dict)


def fit_heads(
    train: Sequence[LabelledPairs],
    dev: Sequence[LabelledPairs],
    embeddings: Mapping[str, EmbeddingFingerprint],
    options: TrainOptions,
    about: Mapping[str, Any],
    report: Report,
) -> FittedHeads:
    """The head of one backbone, or of several. train, dev: the same pairs for each. embeddings: by name, in order.

    The head of several holds a head for each, fitted as for one backbone, and for every combination of them a slope
    and an offset, fitted to the sums of their held-out logits. Raises what `fit_head` raises.
    """
    if len(train) == 1:
        (embedding,) = embeddings.values()
        fitted = fit_head(train[0], dev[0], embedding, options, about, report)
        return FittedHeads(fitted.head, fitted.networks)
    fits = [
        fit_head(own, own_dev, embedding, options, about, _named(report, name))
        for own, own_dev, (name, embedding) in zip(train, dev, embeddings.items(), strict=True)
    ]
    head = _calibrated(fits, options)
    measured = _measured(head, fits, train, dev, options)
    networks = {
        f"{name} {spec}": network
        for name, fit in zip(embeddings, fits, strict=True)
        for spec, network in fit.networks.items()
    }
    whole = {
        **about,
        "version": __version__,
        "embedding": dict(head.embedding.document),
        **measured,
        "training": head.members[0].about["training"],
    }
    return FittedHeads(replace(head, about=whole), networks)


def _calibrated(fits: Sequence[FittedHead], options: TrainOptions) -> FusedHead:
    """The fitted heads with a calibration for every combination of them."""
    calibrations = {}
    for chosen in all_combinations(fits):
        key = combination_key([fit.head.embedding for fit in chosen])
        calibrations[key] = METHODS[options.calibration](_total(chosen), fits[0].labels)
    return FusedHead(tuple(fit.head for fit in fits), calibrations, {})


def _total(fits: Sequence[FittedHead]) -> np.ndarray:
    """The sums of the heads' logits of held-out pairs: (N,)."""
    return np.sum([logits_of(fit.probabilities) for fit in fits], axis=0)


def _measured(
    head: FusedHead,
    fits: Sequence[FittedHead],
    train: Sequence[LabelledPairs],
    dev: Sequence[LabelledPairs],
    options: TrainOptions,
) -> dict[str, Any]:
    """Calibration, thresholds and metrics for the artifact's metadata."""
    total, (slope, offset) = _total(fits), head.calibration(head.members)
    after = sigmoid(slope * total + offset)
    of_dev = head_probabilities(head, dev)
    unseen = UnseenPairs.of(
        HeldOut.first(dev[0], of_dev),
        HeldOut.first(train[0], trusted_out_of_fold(estimator_specs(options), after[: len(after) - len(dev[0])])),
        score=lambda a, b: head_probabilities(head, [replace(pairs, a=a, b=b) for pairs in dev]),
    )
    impostors = head_probabilities(head, [pairs.impostor_pairs() for pairs in dev])
    return measured_about(sigmoid(total), after, fits[0].labels, (dev[0].labels, of_dev), impostors, unseen)


def head_probabilities(head: Head | FusedHead, members: Sequence[LabelledPairs]) -> np.ndarray:
    """P(different) of labelled pairs, the same for each backbone, by a head of one or of several: (N,) float32."""
    if not isinstance(head, FusedHead):
        return probabilities(head, members[0])
    vectors = [(pairs.vectors, np.asarray(pairs.vectors.any(axis=1))) for pairs in members]
    return head.score_pairs(vectors, members[0].a, members[0].b)[0]


def measure_heads(head: Head | FusedHead, members: Sequence[LabelledPairs]) -> Metrics:
    """The metrics on labelled pairs, at its own threshold, of a head of one backbone or of several."""
    return measure(members[0].labels, head_probabilities(head, members), head.threshold())


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    """The inverse of `sigmoid`, finite."""
    tiny = np.finfo(np.float64).tiny
    return np.log(np.maximum(probabilities, tiny)) - np.log(np.maximum(1 - probabilities, tiny))


def _named(report: Report, name: str) -> Report:
    """Reports the epochs of a backbone's network under both their names."""

    def named(network: str, epoch: Epoch) -> None:
        report(f"{name} {network}", epoch)

    return named
