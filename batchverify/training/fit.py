"""Fits a head: what `--algorithm` names, folds, calibration, thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from batchverify.errors import UsageError
from batchverify.evaluation.figures import Curve, Metrics, calibration_error, measure
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.features import Features
from batchverify.heads.head import Head
from batchverify.heads.scorer import Scorer
from batchverify.options import ALGORITHMS, DEFAULT_ALGORITHM, TrainOptions
from batchverify.training.calibration import METHODS, f1_threshold, rate_thresholds, sigmoid
from batchverify.training.linear import fit_linear, log_loss, squared_hinge
from batchverify.training.network import Epoch, NetworkFit, NetworkSettings, fit_network
from batchverify.training.pairs import LabelledPairs
from batchverify.version import __version__

FEWEST_PAIRS = 20
FOLDS = 5
# Fewer pairs in a fold's fit say nothing about the head.
FEWEST_FITTED = 10
# With so many dev pairs their scores alone carry calibration and thresholds.
ENOUGH_DEV_PAIRS = 5000
DEFAULT_FEATURES = {"distance": "chi2sum", "logistic": "chi2", "weighted-chi2": "chi2", "network": "absdiff"}
PAPER_FEATURES = ("chi2", "chi2raw")

Report = Callable[[str, Epoch], None]


def silent(name: str, epoch: Epoch) -> None:
    """A report of epochs that tells nobody."""


@dataclass(frozen=True)
class Fit:
    """What one spec came to: its scorers (several for snapshots) count as one score, their mean."""

    scorers: tuple[Scorer, ...]
    network: NetworkFit | None = None

    @torch.inference_mode()
    def scores(self, pairs: LabelledPairs) -> np.ndarray:
        """(N,) float64."""
        # Filled in place: small results kept between large blocks would leave the heap full of holes.
        scores, done = np.zeros(len(pairs)), 0
        for a, b, _ in pairs.blocks():
            logits = torch.stack([each.logits(a, b) for each in self.scorers]).mean(0)
            scores[done : done + len(a)] = logits.numpy()
            done += len(a)
        return scores


@dataclass(frozen=True)
class EstimatorSpec:
    """One scorer to be fitted: an algorithm of `options.ALGORITHMS` on features."""

    algorithm: str
    features: Features

    @classmethod
    def parse(cls, text: str, features: str | None = None) -> EstimatorSpec:
        """`NAME` or `NAME:FEATURES`; `features` stands in where none are named, else the algorithm's own.

        Raises `UsageError` for an unknown name and for features that the algorithm does not take.
        """
        name, _, own = text.partition(":")
        if name not in ALGORITHMS:
            raise UsageError(f"--algorithm must be one of {', '.join(ALGORITHMS)}, got '{name}'")
        spec = cls(name, Features.parse(own or features or DEFAULT_FEATURES[name]))
        if name == "distance" and not spec.features.scalar:
            raise UsageError(
                "--algorithm distance takes one number a pair (cosine, euclidean or chi2sum), "
                f"got '{spec.features}'"
            )
        if name == "weighted-chi2" and str(spec.features) not in PAPER_FEATURES:
            raise UsageError(
                f"--algorithm weighted-chi2 takes {' or '.join(PAPER_FEATURES)}, got '{spec.features}'"
            )
        return spec

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
            scorer = fit_linear(
                train, self.features, algorithm=self.algorithm, shrinkage=options.shrinkage, loss=loss
            )
            return Fit((scorer,))
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
        return Fit(network.scorers, network)


def estimator_specs(options: TrainOptions) -> list[EstimatorSpec]:
    """The scorers that the options ask for. Raises `UsageError` where one is asked for twice."""
    found = [
        EstimatorSpec.parse(text, options.features) for text in options.algorithms or (DEFAULT_ALGORITHM,)
    ]
    for place, spec in enumerate(found):
        if spec in found[:place]:
            raise UsageError(f"--algorithm {spec} stands there twice: both scorers would be the same")
    return found


def network_settings(options: TrainOptions) -> NetworkSettings:
    """What the options say about networks."""
    return NetworkSettings(**{name: getattr(options, name) for name in NetworkSettings.__dataclass_fields__})


@dataclass(frozen=True)
class Fitted:
    """A head and what its fit told.

    labels, probabilities: (N,) of the pairs behind calibration and thresholds, by fits that have not seen
    them: the training pairs out of fold, then dev. networks: by spec.
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
    about: dict[str, Any] | None = None,
    report: Report = silent,
) -> Fitted:
    """Fit on `train`; dev stops networks; calibration and thresholds come from held-out pairs.

    Those are dev's and, unless `options.folds` says otherwise, the training pairs scored out of fold: no
    weights were fitted to them, though dev decides when networks stop and what `tune` takes. The
    same pairs, options and seed give the same bytes on the same machine. Raises `UsageError` for pairs that
    nothing can be learned from, `TrainingError` where a network cannot learn.
    """
    train.check(FEWEST_PAIRS)
    dev.check()
    wanted = estimator_specs(options)
    folds = _folds(options, train, dev)
    fits, scores = [], []
    with _one_thread():
        for spec in wanted:
            fit = spec.fit(train, dev, options, report)
            fits.append(fit)
            scores.append(
                np.concatenate([_out_of_fold(spec, fit, train, dev, options, folds), fit.scores(dev)])
            )
        labels = np.concatenate([train.labels[: train.originals], dev.labels]) if folds else dev.labels
        scorers, logits = _aligned(fits, scores, labels)
        slope, offset = METHODS[options.calibration](logits, labels)
        head = Head(scorers, (slope, offset), {"embedding": dict(embedding.document)})
        tables = _tables(head, dev, logits, labels)
    networks = {
        str(spec): fit.network for spec, fit in zip(wanted, fits, strict=True) if fit.network is not None
    }
    training = {
        "pairs": train.originals or len(train),
        "folds": folds,
        "options": _fit_options(options, wanted),
    }
    extra = about or {}
    whole = {**extra, "version": __version__, "embedding": dict(embedding.document), **tables}
    whole["training"] = {**extra.get("training", {}), **training}
    return Fitted(replace(head, about=whole), labels, sigmoid(slope * logits + offset), networks)


def measure_head(head: Head, pairs: LabelledPairs) -> Metrics:
    """The head's metrics on labelled pairs, at its own threshold."""
    return measure(pairs.labels, probabilities(head, pairs), head.threshold())


def probabilities(head: Head, pairs: LabelledPairs) -> np.ndarray:
    """(N,) float32: P(different) of labelled pairs, a block of embeddings at a time."""
    size, found = 1 << 14, np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), size):
        rows = slice(start, start + size)
        found[rows] = head(pairs.vectors[pairs.a[rows]], pairs.vectors[pairs.b[rows]])[0]
    return found


def _out_of_fold(
    spec: EstimatorSpec,
    whole: Fit,
    train: LabelledPairs,
    dev: LabelledPairs,
    options: TrainOptions,
    folds: int,
) -> np.ndarray:
    """(N,) scores of the training pairs, each by a fit that has not seen its first image's person."""
    scores = np.zeros(len(train.labels[: train.originals]) if folds else 0)
    checked = whole.network.max_lr if whole.network is not None else None
    for inside, outside in splits(train, folds, options.seed):
        fit = spec.fit(train.subset(inside), dev, options, checked_lr=checked)
        scores[outside] = fit.scores(train.subset(outside))
    return scores


def splits(train: LabelledPairs, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inside, outside): indices of the pairs that a fold is fitted to, and of those it scores.

    A fold's fit sees the labels in their proportion in the whole set: leaving out people takes more
    different pairs than same ones.
    """
    if not folds:
        return
    rng = np.random.default_rng(seed)
    groups, membership = np.unique(train.groups(), return_inverse=True)
    fold = rng.permutation(np.arange(len(groups)) % folds)[membership]
    first, second = fold[train.a], fold[train.b]
    share = (train.labels == 1).mean()
    for number in range(folds):
        inside = np.flatnonzero((first != number) & (second != number))
        different = train.labels[inside] == 1
        counts = np.array([(~different).sum() / (1 - share), different.sum() / share])
        total = counts.min()
        keep = np.concatenate(
            [
                rng.permutation(inside[~different])[: round(total * (1 - share))],
                rng.permutation(inside[different])[: round(total * share)],
            ]
        )
        yield np.sort(keep), np.flatnonzero(first[: train.originals] == number)


def _folds(options: TrainOptions, train: LabelledPairs, dev: LabelledPairs) -> int:
    """How many folds, 0 for none: by default none where dev is large or a fold would leave too little to fit.

    That is so where one image or person stands in nearly all pairs. `UsageError` where folds were asked for.
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
        f"--folds {folds}: without the people of one fold too few {train.name} pairs of both labels are left "
        "to fit; give another number, or 0 for thresholds from dev alone"
    )


def _aligned(
    fits: Sequence[Fit], scores: Sequence[np.ndarray], labels: np.ndarray
) -> tuple[tuple[Scorer, ...], np.ndarray]:
    """Scorers on one scale, each spec first calibrated by itself, and the (N,) mean of their held-out scores.

    The head takes the plain mean of its scorers: a spec weighs by its number of them.
    """
    if len(fits) == 1:
        return fits[0].scorers, scores[0]
    scales = [METHODS["platt"](each, labels) for each in scores]
    scorers = [
        part.rescaled(*scale) for each, scale in zip(fits, scales, strict=True) for part in each.scorers
    ]
    logits = [slope * each + offset for each, (slope, offset) in zip(scores, scales, strict=True)]
    return tuple(scorers), np.average(logits, axis=0, weights=[len(each.scorers) for each in fits])


def _tables(head: Head, dev: LabelledPairs, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Thresholds, calibration before and after, dev metrics: what the artifact's metadata tells."""
    slope, offset = head.calibration
    before, after = sigmoid(logits), sigmoid(slope * logits + offset)
    threshold = f1_threshold(after)
    rate, equal = Curve.of(labels, after).equal_error()
    apart = probabilities(head, dev.impostor_pairs())
    return {
        "calibration": {
            "held_out_pairs": len(labels),
            "before": {"brier": _brier(labels, before), "ece": calibration_error(labels, before)},
            "after": {"brier": _brier(labels, after), "ece": calibration_error(labels, after)},
        },
        "thresholds": {
            "best_f1": threshold,
            "held_out_pairs": len(labels),
            "equal_error": {"threshold": equal, "rate": rate},
            "different_pairs": len(apart),
            "far": [each.to_json() for each in rate_thresholds(apart)],
        },
        "held_out": asdict(measure(labels, after, threshold)),
        "dev": asdict(measure(dev.labels, probabilities(head, dev), threshold)),
    }


def _brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(np.square(probabilities - labels).mean())


def _fit_options(options: TrainOptions, wanted: Sequence[EstimatorSpec]) -> dict[str, Any]:
    """The options that decide a fit, as the metadata tells them."""
    names = ["seed", "calibration", "augment"]
    if any(each.algorithm == "network" for each in wanted):
        names += [name for name in NetworkSettings.__dataclass_fields__ if name != "seed"]
    if any(each.algorithm != "network" for each in wanted):
        names += ["shrinkage"]
    return {"recipes": [str(each) for each in wanted], **{name: getattr(options, name) for name in names}}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine's number of CPUs: the same pairs give the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
