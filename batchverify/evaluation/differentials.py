"""How far error rates of groups are apart: worst case over geometric mean, worst over best, Gini coefficient.

Sources: ISO/IEC 19795-10:2024, Quantifying biometric system performance variation across demographic groups; Grother
2022, NIST IR 8429, Summarizing demographic differentials. Each is 1, the Gini coefficient 0, if all groups are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from batchverify.evaluation.bootstrap import span_of
from batchverify.evaluation.document import Differential, Differentials
from batchverify.options import FEWEST_DRAWS

# The share of draws of equal groups that `by_chance` is above.
BY_CHANCE = 0.95


def worst_over_gmean(rates: np.ndarray) -> np.ndarray:
    """The highest of (..., G) rates over their geometric mean: infinite if some are 0, NaN if all are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return rates.max(axis=-1) / np.exp(np.log(rates).mean(axis=-1))


def worst_over_best(rates: np.ndarray) -> np.ndarray:
    """The highest of (..., G) rates over the lowest one: infinite if some are 0, NaN if all are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return rates.max(axis=-1) / rates.min(axis=-1)


def gini(rates: np.ndarray) -> np.ndarray:
    """The Gini coefficient of (..., G) rates times G / (G - 1), 0 to 1; NaN if all are 0.

    G / (G - 1) x sum over all i, j of |x_i - x_j| / (2 G^2 mean), here by the rates in ascending order. The factor
    makes 1 the highest value for any number of groups. Source: Gini 1912; Deltas 2003 for the factor.
    """
    count = rates.shape[-1]
    ranks = 2 * np.arange(1, count + 1) - count - 1
    with np.errstate(invalid="ignore"):
        found = np.sort(rates, axis=-1) @ ranks / ((count - 1) * rates.sum(axis=-1))
    # Rounding may make equal rates slightly less than 0.
    return np.maximum(found, 0.0)


MEASURES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "worst_over_gmean": worst_over_gmean,
    "worst_over_best": worst_over_best,
    "gini": gini,
}


def measure_differentials(
    names: Sequence[str], rates: np.ndarray, highest: np.ndarray, drawn: np.ndarray
) -> Differentials:
    """Every measure of some groups. rates: (G,). highest: (G,), where the interval of a rate of 0 ends.

    drawn: (draws, G) rates of draws of people, draws may be 0. With rates of 0 a ratio is infinite, its `value` None.
    `at_least` is the lowest value with these rates anywhere in their intervals; None without rates of 0.
    """
    reason = "needs two groups" if len(names) < 2 else None if rates.any() else "no errors"
    found: Differentials = {
        "groups": list(names),
        "reason": reason,
        "worst": None,
        "best": None,
        "measures": {},
    }
    if reason is None:
        found["worst"], found["best"] = names[int(rates.argmax())], names[int(rates.argmin())]
        found["measures"] = {
            name: _differential(measure, rates, highest, drawn) for name, measure in MEASURES.items()
        }
    return found


def _differential(
    measure: Callable[[np.ndarray], np.ndarray], rates: np.ndarray, highest: np.ndarray, drawn: np.ndarray
) -> Differential:
    value = float(measure(rates))
    return {
        "value": None if math.isinf(value) else value,
        "at_least": None if rates.all() else _at_least(measure, rates, highest),
        "interval": span_of(measure(drawn)) if len(drawn) else None,
        "by_chance": _by_chance(measure, rates, drawn),
    }


def _at_least(measure: Callable[[np.ndarray], np.ndarray], rates: np.ndarray, highest: np.ndarray) -> float:
    """The lowest value of a measure with every rate of 0 anywhere below its bound.

    It lies where these rates are as high as their bounds allow, up to one of the other rates or bounds.
    """
    levels = np.where(rates == 0, highest, rates)
    raised = [np.where(rates == 0, np.minimum(highest, level), rates) for level in levels]
    return float(measure(np.stack(raised)).min())


def _by_chance(measure: Callable[[np.ndarray], np.ndarray], rates: np.ndarray, drawn: np.ndarray) -> float | None:
    """What the measure stays below 95 times in 100 if all groups are alike: from the draws' noise alone.

    Each group's drawn rates are divided by its own rate, so that all groups have rate 1 and their own noise.
    """
    if not len(drawn) or not rates.all():
        return None
    values = measure(drawn / rates)
    known = np.sort(values[~np.isnan(values)])
    return float(known[math.ceil((len(known) - 1) * BY_CHANCE)]) if len(known) >= FEWEST_DRAWS else None
