"""Fits a head: estimator specs, folds, calibration and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from batchverify.errors import UsageError
from batchverify.evaluation.figures import Curve, calibration_error, measure
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.centring import centred, mean_vector
from batchverify.heads.drift import LOG_ODDS, histograms
from batchverify.heads.features import Features
from batchverify.heads.head import Head
from batchverify.heads.scorer import Scorer
from batchverify.options import ALGORITHMS, DEFAULT_ALGORITHM, TrainOptions
from batchverify.runtime.devices import survive_forks
from batchverify.training.calibration import METHODS, f1_threshold, platt_scaling, rate_thresholds, sigmoid
from batchverify.training.guarantees import HeldOut, UnseenPairs
from batchverify.training.linear import fit_linear, log_loss, squared_hinge
from batchverify.training.network import NETWORK_OPTIONS, Epoch, NetworkFit, fit_network
from batchverify.training.pairs import LabelledPairs
from batchverify.version import __version__

FEWEST_PAIRS = 20
FOLDS = 5
# The fewest pairs that the fit of a fold needs.
FEWEST_FITTED = 10
# From this many dev pairs on, calibration and thresholds need no folds.
ENOUGH_DEV_PAIRS = 5000
DEFAULT_FEATURES = {"distance": "chi2sum", "logistic": "chi2", "weighted-chi2": "chi2", "network": "absdiff"}
PAPER_FEATURES = ("chi2", "chi2raw")

Report = Callable[[str, Epoch], None]


@dataclass(frozen=True)
class FittedScorers:
    """The fit of one spec. Its score is the mean of its scorers', of which snapshots give several."""

    scorers: tuple[Scorer, ...]
    network: NetworkFit | None = None

    @torch.inference_mode()
    def scores(self, pairs: LabelledPairs) -> np.ndarray:
        """(N,) float64."""
        # Filled in place: small results between large blocks would fragment the heap.
        scores, done = np.zeros(len(pairs)), 0
        for a, b, _ in pairs.blocks():
            logits = torch.stack([scorer.logits(a, b) for scorer in self.scorers]).mean(0)
            scores[done : done + len(a)] = logits.numpy()
            done += len(a)
        return scores


@dataclass(frozen=True)
class EstimatorSpec:
    """What to fit: an algorithm of `options.ALGORITHMS` and its features."""

    algorithm: str
    features: Features

    @classmethod
    def parse(cls, text: str, features: str | None = None) -> EstimatorSpec:
        """Parse `NAME` or `NAME:FEATURES`; without features `features` are taken, or else the algorithm's default.

        Raises `UsageError` for unknown names and for features that the algorithm does not take.
        """
        name, _, own = text.partition(":")
        if name not in ALGORITHMS:
            raise UsageError(f"--algorithm must be one of {', '.join(ALGORITHMS)}, got '{name}'")
        spec = cls(name, Features.parse(own or features or DEFAULT_FEATURES[name]))
        if name == "distance" and not spec.features.scalar:
            raise UsageError(
                f"--algorithm distance takes one of cosine, euclidean and chi2sum, got '{spec.features}'"
            )
        if name == "weighted-chi2" and str(spec.features) not in PAPER_FEATURES:
            raise UsageError(f"--algorithm weighted-chi2 takes {' or '.join(PAPER_FEATURES)}, got '{spec.features}'")
        return spec

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.features}"

    def fit(
        self,
        train: LabelledPairs,
        dev: LabelledPairs,
        options: TrainOptions,
        report: Report = lambda *_: None,
        *,
        checked_lr: float | None = None,
    ) -> FittedScorers:
        """Fit to `train`; dev stops networks. checked_lr: see `fit_network`."""
        if self.algorithm != "network":
            loss = squared_hinge if self.algorithm == "weighted-chi2" else log_loss
            scorer = fit_linear(
                train, self.features, algorithm=self.algorithm, shrinkage=options.shrinkage, loss=loss
            )
            return FittedScorers((scorer,))
        each = partial(report, str(self))
        network = fit_network(train, dev, self.features, options, each, checked_lr=checked_lr)
        return FittedScorers(network.scorers, network)


def estimator_specs(options: TrainOptions) -> list[EstimatorSpec]:
    """The specs that the options name. Raises `UsageError` if one appears twice."""
    texts = options.algorithms or (DEFAULT_ALGORITHM,)
    specs = [EstimatorSpec.parse(text, options.features) for text in texts]
    for spec in specs:
        if specs.count(spec) > 1:
            raise UsageError(f"--algorithm {spec} appears twice: both scorers would be the same")
    return specs


@dataclass(frozen=True)
class FittedHead:
    """A head and how it was fitted.

    labels, probabilities: (N,) of the held-out pairs behind calibration and thresholds: the training pairs out of
    fold, then dev. networks: by spec.
    """

    head: Head
    labels: np.ndarray
    probabilities: np.ndarray
    networks: dict[str, NetworkFit] = field(default_factory=dict)


def fit_head(
    train: LabelledPairs,
    dev: LabelledPairs,
    embedding: EmbeddingFingerprint,
    options: TrainOptions,
    about: Mapping[str, Any] | None = None,
    report: Report = lambda *_: None,
) -> FittedHead:
    """Fit to `train`; dev stops networks; calibration and thresholds come from held-out pairs.

    Held out are the dev pairs and, depending on `options.folds`, the training pairs, scored out of fold. No weights
    are fitted to them, although dev decides when networks stop and what `tune` picks. The same pairs, options and
    seed give the same bytes on the same machine. With `options.centred` the mean of the training images' vectors is
    taken off; it knows no labels, so the folds share it. about: more metadata. Raises `UsageError` for pairs that
    cannot be learned from, `TrainingError` if a network cannot learn.
    """
    train.check(FEWEST_PAIRS)
    dev.check()
    specs = estimator_specs(options)
    folds = _folds(options, train, dev)
    plain_dev = dev
    train, dev, centre = centred_pairs(train, dev, options)
    fits, scores = [], []
    with _one_thread():
        for spec in specs:
            fit = spec.fit(train, dev, options, report)
            fits.append(fit)
            out_of_fold = _out_of_fold(spec, fit, train, dev, options, folds)
            scores.append(np.concatenate([out_of_fold, fit.scores(dev)]))
        labels = np.concatenate([train.labels[: train.originals], dev.labels]) if folds else dev.labels
        scorers, logits = _combined(fits, scores, labels)
        slope, offset = METHODS[options.calibration](logits, labels)
        head = Head(scorers, (slope, offset), {"embedding": dict(embedding.document)}, centre)
        before, after = sigmoid(logits), sigmoid(slope * logits + offset)
        impostors = probabilities(head, plain_dev.impostor_pairs())
        of_dev = probabilities(head, plain_dev)
        unseen = UnseenPairs.of(
            HeldOut.first(plain_dev, of_dev),
            HeldOut.first(train, trusted_out_of_fold(specs, after[: len(labels) - len(dev)])),
            score=lambda a, b: probabilities(head, replace(plain_dev, a=a, b=b)),
        )
        measured = measured_about(before, after, labels, (dev.labels, of_dev), impostors, unseen)
    more = dict(about or {})
    training = {
        **more.pop("training", {}),
        "pairs": train.originals or len(train),
        "folds": folds,
        "options": _fit_options(options, specs),
    }
    head = replace(head, about={**more, "version": __version__, **head.about, **measured, "training": training})
    networks = {str(spec): fit.network for spec, fit in zip(specs, fits, strict=True) if fit.network is not None}
    return FittedHead(head, labels, after, networks)


def centred_pairs(
    train: LabelledPairs, dev: LabelledPairs, options: TrainOptions
) -> tuple[LabelledPairs, LabelledPairs, np.ndarray | None]:
    """Both sets less the mean of the training images' vectors, and that mean; as they are without `centred`."""
    if not options.centred:
        return train, dev, None
    centre = mean_vector(train.vectors[train.images()])
    train, dev = (replace(pairs, vectors=centred(pairs.vectors, centre)) for pairs in (train, dev))
    return train, dev, centre


def probabilities(head: Head, pairs: LabelledPairs) -> np.ndarray:
    """P(different) of labelled pairs: (N,) float32."""
    return head.score_pairs(pairs.vectors, pairs.a, pairs.b)[0]


def _out_of_fold(
    spec: EstimatorSpec,
    whole: FittedScorers,
    train: LabelledPairs,
    dev: LabelledPairs,
    options: TrainOptions,
    folds: int,
) -> np.ndarray:
    """(N,) scores of the training pairs, each by a fit without the person of its first image; empty without folds."""
    scores = np.zeros(len(train.labels[: train.originals]) if folds else 0)
    checked_lr = whole.network.max_lr if whole.network is not None else None
    for inside, outside in splits(train, folds, options.seed):
        fit = spec.fit(train.subset(inside), dev, options, checked_lr=checked_lr)
        scores[outside] = fit.scores(train.subset(outside))
    return scores


def trusted_out_of_fold(specs: Sequence[EstimatorSpec], out_of_fold: np.ndarray) -> np.ndarray:
    """The out-of-fold probabilities that bounds may count, all or none.

    A fold's fit has seen the second person of some different pairs. That says nothing about a distance, which fits
    two numbers; heads with weights of their own are bounded by dev alone.
    """
    return out_of_fold if all(spec.algorithm == "distance" for spec in specs) else out_of_fold[:0]


def splits(train: LabelledPairs, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inside, outside) of each fold: indices of the pairs to fit to, and of the pairs to score.

    Leaving out people removes more different pairs than same pairs. Pairs of the surplus label are dropped, so that
    the proportion of the labels stays that of the whole set.
    """
    if not folds:
        return
    rng = np.random.default_rng(seed)
    groups, group_of_image = np.unique(train.groups(), return_inverse=True)
    fold = rng.permutation(np.arange(len(groups)) % folds)[group_of_image]
    first, second = fold[train.a], fold[train.b]
    share = (train.labels == 1).mean()
    for number in range(folds):
        inside = np.flatnonzero((first != number) & (second != number))
        different = train.labels[inside] == 1
        counts = np.array([(~different).sum() / (1 - share), different.sum() / share])
        total = counts.min()
        same_rows = rng.permutation(inside[~different])[: round(total * (1 - share))]
        different_rows = rng.permutation(inside[different])[: round(total * share)]
        outside = np.flatnonzero(first[: train.originals] == number)
        yield np.sort(np.concatenate([same_rows, different_rows])), outside


def _folds(options: TrainOptions, train: LabelledPairs, dev: LabelledPairs) -> int:
    """The number of folds, 0 for none.

    By default none if dev is large, or if a fold leaves too few pairs to fit because one person or image is in nearly
    all of them. Raises `UsageError` if that happens with a given number of folds.
    """
    if options.folds == 0 or (options.folds is None and len(dev) >= ENOUGH_DEV_PAIRS):
        return 0
    folds = options.folds or FOLDS
    fitted = [train.labels[inside] for inside, _ in splits(train, folds, options.seed)]
    if all(len(labels) >= FEWEST_FITTED and labels.min() != labels.max() for labels in fitted):
        return folds
    if options.folds is None:
        return 0
    raise UsageError(
        f"--folds {folds}: without the people of one fold too few {train.name} pairs of both labels are left; "
        "give another number, or 0 to use dev alone"
    )


def _combined(
    fits: Sequence[FittedScorers], scores: Sequence[np.ndarray], labels: np.ndarray
) -> tuple[tuple[Scorer, ...], np.ndarray]:
    """All scorers, each spec calibrated by itself so that they share a scale, and their mean held-out scores (N,).

    As in the head, which takes the plain mean, a spec weighs as much as its number of scorers.
    """
    if len(fits) == 1:
        return fits[0].scorers, scores[0]
    scorers, logits = [], []
    for fit, spec_scores in zip(fits, scores, strict=True):
        slope, offset = platt_scaling(spec_scores, labels)
        scorers += [scorer.rescaled(slope, offset) for scorer in fit.scorers]
        logits.append(slope * spec_scores + offset)
    return tuple(scorers), np.average(logits, axis=0, weights=[len(fit.scorers) for fit in fits])


def measured_about(
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    dev: tuple[np.ndarray, np.ndarray],
    impostors: np.ndarray,
    unseen: UnseenPairs,
) -> dict[str, Any]:
    """Calibration, thresholds and metrics for the artifact's metadata.

    before, after: probabilities of held-out pairs without and with calibration. dev: labels and probabilities.
    impostors: probabilities of different pairs. unseen: what bounds are counted from.
    """
    threshold = f1_threshold(after)
    rate, equal = Curve.of(labels, after).equal_error()
    return {
        "calibration": {
            "held_out_pairs": len(labels),
            "same_share": float((labels == 0).mean()),
            "before": {"brier": _brier(labels, before), "ece": calibration_error(labels, before)},
            "after": {"brier": _brier(labels, after), "ece": calibration_error(labels, after)},
        },
        "thresholds": {
            "best_f1": threshold,
            "held_out_pairs": len(labels),
            "equal_error": {"threshold": equal, "rate": rate},
            "different_pairs": len(impostors),
            "far": unseen.with_bounds(rate_thresholds(impostors)),
            "bounds": unseen.about(),
        },
        LOG_ODDS: histograms(labels, after),
        "held_out": asdict(measure(labels, after, threshold)),
        "dev": asdict(measure(*dev, threshold)),
    }


def _brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(np.square(probabilities - labels).mean())


def _fit_options(options: TrainOptions, specs: Sequence[EstimatorSpec]) -> dict[str, Any]:
    """The options that affect the fit, for the metadata."""
    names = ["seed", "calibration", "augment", "centred"]
    if any(spec.algorithm == "network" for spec in specs):
        names += NETWORK_OPTIONS
    if any(spec.algorithm != "network" for spec in specs):
        names += ["shrinkage"]
    return {"recipes": [str(spec) for spec in specs], **{name: getattr(options, name) for name in names}}


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread and the caller's random state kept, so that the same pairs give the same bytes."""
    survive_forks()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
