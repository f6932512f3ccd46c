"""Fit a head on pairs of embeddings: logistic regression on chi-square terms, shrunk to equal weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from batchverify.calibration import rate_thresholds
from batchverify.errors import ManifestError, UsageError
from batchverify.features import FEATURES
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.gallery import Gallery
from batchverify.head import Head
from batchverify.manifest import TRUE_LABEL, Block
from batchverify.metrics import best_f1, measure
from batchverify.version import __version__

FEATURE = "chi2"
# Strength of the pull towards equal weights, chosen by out-of-fold AUC on the training pairs: 2,048 pairs do
# not support weights that differ much (AUC .99965 at 1, .99957 at 0.003).
SHRINKAGE = 1.0
# Images whose pairs make the table of false accept rates: 224,115 pairs at most support the lowest rate twice
# over, and as float16 vectors they take 460 MB.
MOST_STRANGERS = 670


def fit_head(
    train: tuple[np.ndarray, np.ndarray, np.ndarray],
    dev: tuple[np.ndarray, np.ndarray, np.ndarray],
    strangers: tuple[np.ndarray, np.ndarray],
    embedding: EmbeddingFingerprint,
    about: dict[str, Any],
) -> Head:
    """Fit on `train`, choose thresholds on `dev`.

    train, dev: (a, b, labels) with (N, 512) float embeddings and (N,) 0 or 1.
    strangers: (a, b), different pairs of dev images for the table of false accept rates. Deterministic.
    Raises `UsageError` for pairs that nothing can be learned from.
    """
    check_pairs("training", *train)
    check_pairs("dev", *dev)
    head = Head(FEATURE, *fit_weights(*train))
    probabilities = head(dev[0], dev[1])[0]
    threshold = best_f1(dev[2], probabilities)[1]
    apart = head(*strangers)[0]
    return replace(
        head,
        about={
            **about,
            "version": __version__,
            "embedding": dict(embedding.document),
            "training": {**about.get("training", {}), "pairs": len(train[2]), "shrinkage": SHRINKAGE},
            "dev": asdict(measure(dev[2], probabilities, threshold)),
            "thresholds": {
                "best_f1": threshold,
                "different_pairs": len(apart),
                "far": [each.to_json() for each in rate_thresholds(apart)],
            },
        },
    )


def check_pairs(name: str, a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> None:
    """`UsageError` for pairs (N, F), (N, F), (N,) without both labels or with vectors that are not finite."""
    same, different = int((labels == 0).sum()), int((labels == 1).sum())
    if min(same, different) < 1 or same + different != len(labels):
        raise UsageError(
            f"the {name} pairs need label 0 and label 1: "
            f"of {len(labels):,} pairs {same:,} are same and {different:,} different"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError(f"the {name} pairs hold embeddings that are not finite: `cache verify` finds them")


def fit_weights(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (512,) float32 and bias of P(different) = sigmoid(terms · weights + bias).

    The logit is slope · (sum of all terms, standardised) + terms · u with a ridge on u alone, solved in
    float64 by L-BFGS on one thread, so that the same pairs give the same bytes. Raises `UsageError` for
    pairs that are all alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fit_weights(a, b, labels)
    finally:
        torch.set_num_threads(threads)


def _fit_weights(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    terms = FEATURES[FEATURE](torch.from_numpy(a).double(), torch.from_numpy(b).double())  # (N, F)
    truth = torch.from_numpy(np.asarray(labels)).double()
    total = terms.sum(dim=1)
    middle, spread = total.mean(), total.std()
    scale = terms.std(dim=0).mean()
    slope = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    extra = torch.zeros(terms.shape[1], dtype=torch.float64, requires_grad=True)

    def weights_and_bias() -> tuple[torch.Tensor, torch.Tensor]:
        weights = slope[1] / spread + extra / scale
        return weights, slope[0] - slope[1] * middle / spread - (extra / scale * terms.mean(dim=0)).sum()

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        weights, bias = weights_and_bias()
        logits = terms @ weights + bias
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
        value = fit + SHRINKAGE * extra.square().sum() + 1e-5 * slope[1].square()
        value.backward()
        return value

    optimiser = torch.optim.LBFGS(
        [slope, extra], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    optimiser.step(loss)
    weights, bias = weights_and_bias()
    if not weights.isfinite().all():
        raise UsageError("the training pairs cannot be told apart: their embeddings are all alike")
    return weights.detach().numpy().astype(np.float32), float(bias.detach())


@dataclass(frozen=True)
class LabelledPairs:
    """The labelled pairs of a manifest that could be embedded.

    a, b: (N,) int64 indices of images. labels: (N,) int8. left_out: how many other pairs there were.
    persons: person by image index, where the manifest says so.
    """

    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray
    left_out: int
    persons: dict[int, str]

    @classmethod
    def collect(cls, blocks: Iterable[Block], gallery: Gallery) -> LabelledPairs:
        """Gather the labelled, embedded pairs of a manifest, read to its end; blank persons are nobody."""
        parts, rows = [], 0
        persons: dict[int, str] = {}
        for block in blocks:
            if TRUE_LABEL not in block.carried.schema.names:
                raise ManifestError("the manifest has no column 'label': nothing to learn from")
            labels = block.carried.column(TRUE_LABEL).fill_null(-1).to_numpy(zero_copy_only=False)
            kept = gallery.usable(block.a, block.b) & (labels >= 0)
            parts.append((block.a[kept], block.b[kept], labels[kept]))
            rows += len(labels)
            for name, indices in (("person_a", block.a), ("person_b", block.b)):
                if name in block.carried.schema.names:
                    people = zip(indices.tolist(), block.carried.column(name).to_pylist(), strict=True)
                    persons.update((index, str(person)) for index, person in people if person)
        a, b, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
        return cls(a, b, labels, rows - len(labels), persons)

    def vectors(self, gallery: Gallery) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(a, b, labels) with (N, 512) float16 embeddings."""
        return gallery.vectors[self.a], gallery.vectors[self.b], self.labels

    def strangers(self, gallery: Gallery) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (a, b) of all pairs of images of two people; the labelled ones alone without persons.

        Of more than `MOST_STRANGERS` images a fixed draw is taken: pairs grow with the square of the images.
        """
        if not self.persons:
            apart = self.labels == 1
            return gallery.vectors[self.a[apart]], gallery.vectors[self.b[apart]]
        images = np.array(sorted(index for index in self.persons if gallery.codes[index] == 0), np.int64)
        if len(images) > MOST_STRANGERS:
            images = np.sort(np.random.default_rng(0).choice(images, MOST_STRANGERS, replace=False))
        names = np.array([self.persons[index] for index in images])
        first, second = np.triu_indices(len(images), 1)
        apart = names[first] != names[second]
        return gallery.vectors[images[first[apart]]], gallery.vectors[images[second[apart]]]
