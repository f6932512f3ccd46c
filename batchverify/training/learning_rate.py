"""Learning rates: the range test that finds one, and the cycle that it goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

# Of the smoothed loss, what comes from the steps before.
SMOOTHING = 0.8
# The test ends where the smoothed loss is so many times its minimum.
DIVERGED = 4.0
# Of the cycle: the share of the steps that it rises, the first rate and the last one, as parts of the highest.
RISING, FIRST, LAST = 0.3, 1 / 25, 1 / 25e4


@dataclass(frozen=True)
class RangeTest:
    """A learning-rate range test (Smith 2018): the smoothed loss at each rate, and the rate picked."""

    rates: list[float]
    losses: list[float]
    pick: float

    @classmethod
    def run(cls, step: Callable[[float], float], rates: Iterable[float]) -> RangeTest:
        """Make a step at each rate, in ascending order; pick the rate at which the smoothed loss falls fastest.

        step: takes a rate and returns the loss. Ends early if the loss is four times its minimum or not finite.
        Source: Smith 2018, section 3.
        """
        tried: list[float] = []
        losses: list[float] = []
        smooth = best = math.inf
        for rate in rates:
            loss = step(rate)
            if not math.isfinite(loss):
                break
            smooth = loss if not tried else SMOOTHING * smooth + (1 - SMOOTHING) * loss
            tried.append(rate)
            losses.append(smooth)
            best = min(best, smooth)
            if not smooth < DIVERGED * best:
                break
        # Only up to the minimum: after it the loss is erratic.
        changes = np.diff(losses[: int(np.argmin(losses)) + 1]) if losses else np.zeros(0)
        first = tried[0] if tried else math.nan
        return cls(tried, losses, tried[int(np.argmin(changes))] if len(changes) else first)


def one_cycle(step: int, steps: int) -> float:
    """The rate at a step from 0, of `steps` in all, as a part of the highest rate (Smith 2018, arXiv 1803.09820).

    It rises from 1/25 over 30 % of the steps, then falls to a 250,000th, both along a cosine.
    """
    top = RISING * steps - 1
    if step <= top:
        return _between(FIRST, 1.0, step / top if top else 1.0)
    return _between(1.0, LAST, (step - top) / (steps - 1 - top))


def _between(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))
