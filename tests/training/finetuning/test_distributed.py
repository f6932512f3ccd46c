"""Fine-tuning in two processes of Ray: the weights of one process, errors, a worker that dies."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_samples import Deadly, Kept, SmallNetwork, people_set, quick, steps_of

from batchverify.errors import TrainingError, UsageError
from batchverify.training.finetuning.checkpoint import NAME
from batchverify.training.finetuning.distributed import cpus_each, fit_on_workers
from batchverify.training.finetuning.fit import FinetuneTask, StoredPairs, fit

TRAIN = people_set(24, 1, views=2)
# On dev the last epoch is to be the best one, whose weights are compared.
DEV = TRAIN
TWO = quick(workers=2, epochs=2, dropout=0.2, checkpoint_steps=3)


def train(function, options, folder, *, stored=TRAIN[0], pairs=TRAIN[1], **others):
    network = SmallNetwork(dropout=options.dropout)
    task = FinetuneTask(network, StoredPairs(stored, pairs), StoredPairs(*DEV), options, folder)
    return network, function(task, **others)


@pytest.fixture(autouse=True)
def no_watcher(monkeypatch):
    """Ray Train's own watch for machines that are taken away is one more process a run; nothing here is."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def near(one, other):
    return all(
        torch.allclose(mine, theirs, rtol=0, atol=1e-5)
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.fixture
def local(tmp_path):
    """What one process makes of the batches of two workers."""
    return train(fit, replace(TWO, workers=1, accumulate=2), tmp_path / "local")


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_two_workers_one_of_which_dies_learn_what_one_process_learns(local, tmp_path):
    seen = []
    folder, mortal = tmp_path / "two", Deadly(TRAIN[0], tmp_path, 12)
    network, result = train(
        fit_on_workers,
        TWO,
        folder,
        stored=mortal,
        report=seen.append,
    )
    expected_network, expected = local
    assert (tmp_path / "died").exists()
    assert near(network, expected_network) and not near(network, SmallNetwork())
    assert result.best_epoch == expected.best_epoch == 2 and result.max_lr == expected.max_lr
    for mine, theirs in zip(result.epochs, expected.epochs, strict=True):
        assert mine.dev_auc == pytest.approx(theirs.dev_auc, abs=1e-3)
        assert theirs.loss is None or mine.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert seen == result.epochs and steps_of(folder) == (18, 18)
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_errors_of_workers_are_those_of_one_process(tmp_path):
    broken = Kept(np.full_like(TRAIN[0].values, np.nan))
    with pytest.raises(TrainingError, match=r"the vectors of 96 training images .* are not finite before training"):
        train(fit_on_workers, TWO, tmp_path / "two", stored=broken)
    assert not [path for path in (tmp_path / "two").iterdir() if path.name.startswith("ray-")]


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_more_workers_than_cpus(tmp_path):
    with pytest.raises(UsageError, match="--workers 3 needs a CPU for each, but Ray has 2"):
        train(fit_on_workers, replace(TWO, workers=3), tmp_path / "three")
    with pytest.raises(UsageError, match="--workers 2 with --device cuda: Ray has 0 GPUs"):
        train(fit_on_workers, replace(TWO, device="cuda"), tmp_path / "gpu")


def test_one_worker_needs_no_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    one = replace(TWO, workers=1, accumulate=2)
    network, _ = train(fit_on_workers, one, tmp_path / "a")
    expected, _ = train(fit, one, tmp_path / "b")
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [((2,), 2, 1), ((2,), 3, 0), ((16,), 3, 5), ((3, 3), 2, 3), ((3, 3), 3, 1), ((8, 2), 3, 2), ((), 2, 0)],
)
def test_cpus_of_each_worker(nodes, workers, each):
    assert cpus_each(nodes, workers) == each
