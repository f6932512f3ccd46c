"""The benchmark of extrapolated intervals: its true rates, and its counts of real faces."""

import numpy as np
import pytest
from benchmark_modules import benchmark_module


@pytest.fixture
def benchmark():
    """The benchmark as a module."""
    with benchmark_module("extreme_intervals") as module:
        yield module


@pytest.mark.parametrize("place", range(9))
def test_true_rates_are_those_of_many_draws(benchmark, place):
    population = benchmark.POPULATIONS[place]
    scores, units = population.draw(np.random.default_rng(0), 20_000, 10)
    assert len(scores) == len(units.a) == 200_000 and (units.a != units.b).all()
    level = population.level(0.02)
    assert population.far(level) == pytest.approx(0.02)
    assert (scores > level).mean() == pytest.approx(0.02, rel=0.15)


def test_couples_of_faces_are_counted(benchmark, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    vectors, people = rng.normal(size=(60, 8)), np.repeat(np.arange(20), 3)
    np.savez(tmp_path / "faces.npz", vectors=vectors, people=people)
    monkeypatch.setattr(benchmark.Faces, "KEPT", 0.3)
    monkeypatch.setattr(benchmark.Faces, "BLOCK", 60)
    faces = benchmark.Faces(tmp_path / "faces.npz")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    a, b = np.triu_indices(60, 1)
    cosines = np.sort((unit[a] * unit[b]).sum(axis=1)[people[a] != people[b]])
    assert faces.couples == len(cosines)
    assert faces.level(0.01) == pytest.approx(cosines[-17], abs=1e-5)
    assert faces.far(cosines[-5] - 1e-4) == pytest.approx(5 / len(cosines))
    scores, units = faces.draw(rng, 12, 100)
    assert len(scores) == 100 and (units.a != units.b).all() and len(np.unique(units.a)) <= 12
