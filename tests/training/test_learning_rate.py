"""The range test's rule and the cycle of the learning rate."""

import math

import numpy as np
import pytest
import torch

from batchverify.training.learning_rate import RangeTest, one_cycle


@pytest.mark.parametrize("steps", [10, 57, 1000])
def test_the_cycle_is_that_of_torch(steps):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2.0, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert 2 * one_cycle(step, steps) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        if step < steps - 1:
            schedule.step()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_cycles_have_finite_rates(steps):
    rates = [one_cycle(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_the_pick_is_where_the_smoothed_loss_falls_fastest():
    rates = np.geomspace(1e-5, 1, 50).tolist()
    # Falls most steeply at 1e-3, rises again from 1e-1 on.
    losses = [2 - math.tanh(3 * math.log10(rate / 1e-3)) + 2 * max(0, math.log10(rate / 1e-1)) for rate in rates]
    feed = iter(losses)
    seen = []

    def step(rate):
        seen.append(rate)
        return next(feed)

    test = RangeTest.run(step, rates)
    assert seen == rates == test.rates and test.losses[0] == losses[0]
    assert test.losses[1] == pytest.approx(0.8 * losses[0] + 0.2 * losses[1])
    # Smoothing comes a few steps late.
    assert 1e-3 <= test.pick < 4e-3


@pytest.mark.parametrize("bad", [100.0, math.nan, math.inf])
def test_it_ends_early_if_the_loss_diverges(bad):
    feed = iter([1.0, 0.9, 0.8, bad])
    test = RangeTest.run(lambda _: next(feed), [1, 2, 3, 4, 5, 6])
    assert len(test.rates) == (4 if bad == 100 else 3)
    assert np.isfinite(test.losses).all() and test.pick in (2, 3)


def test_a_loss_that_never_falls_picks_the_first_rate():
    feed = iter([1.0, 1.1, 1.2])
    assert RangeTest.run(lambda _: next(feed), [0.1, 0.2, 0.3]).pick == 0.1
    assert math.isnan(RangeTest.run(lambda _: math.nan, [0.1]).pick)
