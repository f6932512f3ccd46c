"""Fit a head on pairs of embeddings: logistic regression on chi-square terms, shrunk towards equal weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from batchverify.calibration import rate_thresholds
from batchverify.features import FEATURES
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.head import Head
from batchverify.metrics import best_f1, measure
from batchverify.version import __version__

FEATURE = "chi2"
# Strength of the pull towards equal weights, chosen by out-of-fold AUC on the training pairs: 2,048 pairs do
# not support weights that differ much (AUC .99965 at 1, .99957 at 0.003).
SHRINKAGE = 1.0


def fit_head(
    train: tuple[np.ndarray, np.ndarray, np.ndarray],
    dev: tuple[np.ndarray, np.ndarray, np.ndarray],
    strangers: tuple[np.ndarray, np.ndarray],
    embedding: EmbeddingFingerprint,
    about: dict[str, Any],
) -> Head:
    """Fit on `train`, choose thresholds on `dev`: each (a, b, labels) with (N, 512) embeddings and (N,) 0 or 1.

    strangers: (a, b), different pairs of dev images for the table of false accept rates. Deterministic.
    """
    weights, bias = fit_weights(*train)
    head = Head(FEATURE, weights, bias)
    probabilities = head(dev[0], dev[1])[0]
    threshold = best_f1(dev[2], probabilities)[1]
    apart = head(*strangers)[0]
    return Head(
        FEATURE,
        weights,
        bias,
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


def fit_weights(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (512,) float32 and bias of P(different) = sigmoid(terms · weights + bias).

    The logit is slope · (sum of all terms, standardised) + terms · u with a ridge on u alone, solved in
    float64 by L-BFGS on one thread, so that the same pairs give the same bytes.
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

    optimiser = torch.optim.LBFGS([slope, extra], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    optimiser.step(loss)
    weights, bias = weights_and_bias()
    return weights.detach().numpy().astype(np.float32), float(bias.detach())
