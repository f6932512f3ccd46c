"""Out-of-fold probabilities: each pair is judged by a logistic regression that was fitted to other pairs.

The labels may be partly wrong; with few features and many pairs these hardly move the regression.
"""

from __future__ import annotations

import numpy as np

FOLDS = 10
# The ridge penalty of each weight but the intercept, for standardised features.
PENALTY = 1.0
# Fewer pairs of either label say too little.
FEWEST = 50
_STEPS, _CHANGE = 50, 1e-8
# Beyond these a logistic function is 0 or 1 as a float64.
_FARTHEST = 36.0


def out_of_fold(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """(N,) probabilities of label 1, from (N, F) features and (N,) labels 0 and 1.

    Folds are drawn at random by the seed. None if fewer than `FEWEST` pairs have one of the labels.
    """
    if min(labels.sum(), len(labels) - labels.sum()) < FEWEST:
        return None
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    inputs = np.column_stack([np.ones(len(scaled)), scaled])
    fold = np.random.default_rng(seed).permutation(len(labels)) % FOLDS
    found = np.empty(len(labels))
    for number in range(FOLDS):
        held = fold == number
        found[held] = logistic(inputs[held] @ fitted(inputs[~held], labels[~held]))
    return found


def fitted(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(F,) weights of a ridge logistic regression by Newton's method. inputs: (N, F), the first column 1."""
    weights, penalty = np.zeros(inputs.shape[1]), np.full(inputs.shape[1], PENALTY)
    penalty[0] = 1e-9
    for _ in range(_STEPS):
        likely = logistic(inputs @ weights)
        slope = inputs.T @ (likely - labels) + penalty * weights
        curve = (inputs * (likely * (1 - likely))[:, None]).T @ inputs + np.diag(penalty)
        step = np.linalg.solve(curve, slope)
        # A step as long as this overshoots where nearly all pairs are sure.
        weights = weights - step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-300))
        if float(np.abs(step).max()) < _CHANGE:
            break
    return weights


def logistic(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values))."""
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -_FARTHEST, _FARTHEST))))
