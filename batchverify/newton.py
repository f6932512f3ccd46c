"""Newton's method for a smooth convex function: exact, deterministic, and for any way to add it up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

STEPS = 100
# Relative to the function's value: smaller progress is rounding.
TOLERANCE = 1e-12
HALVINGS = 30

Derivatives = tuple[np.ndarray, np.ndarray]


def minimise(
    value: Callable[[np.ndarray], float], derivatives: Callable[[np.ndarray], Derivatives], start: np.ndarray
) -> np.ndarray:
    """The (D,) float64 place where a convex function is smallest.

    value: the function. derivatives: its gradient (D,) and Hessian (D, D), positive definite. A step that
    overshoots is halved. Ends when progress is below rounding; values that are not finite end it, too.
    """
    place, current = start, value(start)
    for _ in range(STEPS):
        gradient, hessian = derivatives(place)
        step = _solved(hessian, gradient)
        for _ in range(HALVINGS):
            new = value(place - step)
            if new <= current:
                break
            step = step / 2
        if not new <= current:
            break
        gain, place, current = current - new, place - step, new
        # The last step, too small for the value to show it, is taken: it squares the error of the place.
        if gain <= TOLERANCE * max(abs(current), 1e-9):
            break
    return place


def _solved(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """By torch, whose threads a fit holds to one: numpy's would give other bits on other numbers of CPUs."""
    solution: np.ndarray = torch.linalg.solve(torch.from_numpy(hessian), torch.from_numpy(gradient)).numpy()
    return solution
