"""Checkpoints: processes killed at any moment end with the bits of an undisturbed one; others are refused."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing import forkserver
from typing import Any

import numpy as np
import pytest
import torch
from finetune_process import train_small
from finetune_samples import SmallNetwork, people_set, quick
from repository import REPOSITORY, SUPPORT
from safetensors import safe_open
from safetensors.torch import save

from batchverify.errors import ArtifactError, BatchverifyError, TrainingError
from batchverify.training.finetuning.checkpoint import NAME, Checkpoint, named
from batchverify.training.finetuning.fit import FinetuneTask, StoredPairs, fit

NEVER = ("step", 10**6)
# Changes of the options, and the moments at which one run after the other is killed.
WAYS: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "pair": (
        {},
        [("before", 1), ("after", 1), ("step", 1), ("step", 6), ("before", 2), ("after", 2), ("step", 9)],
    ),
    "two threads": ({"loss": "contrastive", "threads": 2, "max_lr": 3e-3, "epochs": 1}, [("step", 6)]),
    "arcface with a teacher": (
        {"loss": "arcface", "teacher": "any", "max_lr": 3e-3, "accumulate": 1},
        [("step", 2), ("after", 2)],
    ),
    "triplet in bfloat16": (
        {"loss": "triplet", "dtype": "bfloat16", "accumulate": 1},
        [("after", 2), ("step", 1)],
    ),
}


@pytest.fixture(scope="module")
def start():
    """Start `train_small` in a real process, forked from one that has loaded what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune_process"])
    # Before Python 3.13 the server does not take over `sys.path`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(SUPPORT)]))
        forkserver.ensure_running()

    def begin(folder, moment, changes):
        settings = dict(changes)
        threads = settings.pop("threads", 1)
        process = context.Process(target=train_small, args=(folder, moment, threads, settings))
        process.start()
        return process

    return begin


@pytest.fixture
def run(start):
    """Run to the end or to the kill; the exit code."""

    def finish(*arguments):
        process = start(*arguments)
        process.join()
        return process.exitcode

    return finish


def end(folder):
    """What a training ended with: the bytes of its weights, and its course."""
    return (folder / "end.safetensors").read_bytes(), (folder / "end.json").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_moment_it_ends_with_the_same_bits(run, tmp_path, way):
    changes, moments = WAYS[way]
    assert run(tmp_path / "undisturbed", NEVER, changes) == 0
    folder = tmp_path / "killed"
    for moment in moments:
        assert run(folder, moment, changes) == -signal.SIGKILL
        assert not (folder / "end.json").exists()
    assert run(folder, NEVER, changes) == 0
    assert end(folder) == end(tmp_path / "undisturbed")


def test_killed_from_outside(start, run, tmp_path):
    began = time.monotonic()
    assert run(tmp_path / "undisturbed", NEVER, {}) == 0
    longest, expected = time.monotonic() - began, end(tmp_path / "undisturbed")
    dice, kills = random.Random(1), 0
    for number in range(2):
        folder = tmp_path / str(number)
        for _ in range(3):
            process = start(folder, NEVER, {})
            time.sleep(dice.uniform(0.2, 0.9) * longest)
            process.kill()
            process.join()
            kills += process.exitcode != 0
        assert run(folder, NEVER, {}) == 0
        assert end(folder) == expected
        # Of what the killed ones were writing nothing is left.
        assert {path.name for path in folder.iterdir()} == {NAME, "end.json", "end.safetensors"}
    assert kills >= 2


class Trained:
    """A finished training: its end, and how to run it again with changes."""

    def __init__(self, folder):
        self.folder = folder
        self.train, self.dev = people_set(12, 1), people_set(8, 2, "dev")
        self.first = self()

    def __call__(self, options=None, *, seed=0, train=None, report=lambda _: None):
        network, (stored, pairs) = SmallNetwork(seed), train or self.train
        options = options or quick(epochs=2)
        task = FinetuneTask(network, StoredPairs(stored, pairs), StoredPairs(*self.dev), options, self.folder)
        return network, fit(task, report)


@pytest.fixture
def trained(tmp_path):
    """A finished training."""
    return Trained(tmp_path)


def test_a_finished_training_is_not_repeated(trained, tmp_path, monkeypatch):
    before = (tmp_path / NAME).read_bytes()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a step"))
    seen = []
    network, result = trained(report=seen.append)
    assert (tmp_path / NAME).read_bytes() == before
    assert result == trained.first[1] and seen == result.epochs
    expected = trained.first[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_what_decides_the_end_is_part_of_the_checkpoint(trained):
    stored, pairs = trained.train
    swapped = replace(pairs, labels=(1 - pairs.labels).astype(np.int8))
    for changes in (
        {"options": quick(epochs=3)},
        {"options": quick(epochs=2, seed=1)},
        {"options": quick(epochs=2, loss="contrastive")},
        {"options": quick(epochs=2, accumulate=2)},
        {"options": quick(epochs=2, dtype="bfloat16")},
        {"seed": 1},
        {"train": (stored, swapped)},
    ):
        with pytest.raises(ArtifactError, match=rf"{NAME}: the checkpoint belongs to a training with other options"):
            trained(**changes)
    # These do not.
    assert trained(quick(epochs=2, quiet=True, checkpoint_steps=7, batch_size=3))[1] == trained.first[1]


@pytest.mark.parametrize(
    "data",
    [b"", b"short", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"{}", b"\x08" + b"\0" * 7 + b"[1, 2, 3"],
    ids=str,
)
def test_damaged_checkpoints(trained, tmp_path, data):
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{NAME}: the checkpoint is damaged: remove it"):
        trained()


def test_a_shortened_checkpoint(trained, tmp_path):
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="damaged"):
        trained()
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        trained()


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "1"},
        {"steps": 10**9},
        {"total": 1},
        {"max_lr": None},
        {"max_lr": float("nan")},
        {"loss": [1]},
        {"epochs": []},
        {"epochs": [{"epoch": 0}]},
        {"epochs": 3},
        {"best_epoch": 9},
        {"range_test": {"rates": 1}},
        {"more": 1},
        {"learner": {}},
        {"learner": {"network.linear.bias": torch.zeros(1)}},
        {"best": {"linear.bias": torch.zeros(1)}},
        {"best": {"more": torch.zeros(1)}},
        {"optimiser": {"0.exp_avg": torch.zeros(1)}},
        {"optimiser": {"0.exp_avg": None}},
    ],
    ids=str,
)
def test_a_checkpoint_that_was_made_up_is_damaged(trained, tmp_path, change):
    """Of this training by its identity, but with other values, tensors or shapes."""
    there = Checkpoint.read(tmp_path)
    tensors, progress = dict(there.tensors), dict(there.progress)
    [(name, value)] = change.items()
    if name in ("learner", "best", "optimiser"):
        changed = there.part(name) | value if value else {}
        others = {key: each for key, each in tensors.items() if not key.startswith(f"{name}.")}
        tensors = others | {k: v for k, v in named(name, changed).items() if v is not None}
    else:
        progress[name] = value
    Checkpoint(there.identity, tensors, progress).write(tmp_path)
    with pytest.raises(ArtifactError, match=rf"{NAME}: the checkpoint is damaged: remove it"):
        trained()


def test_a_checkpoint_is_not_called_damaged_where_memory_runs_out(trained, monkeypatch):
    """Who removes it loses the training."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("batchverify.training.finetuning.fit.restore_moments", refuse)
    with pytest.raises(TrainingError, match="not enough memory"):
        trained()


def test_json_that_is_too_deep_or_no_object_is_damage(trained, tmp_path):
    for text in ("[" * 100_000, "[" * 40 + "]" * 40, "3", "[]", '{"identity": 1, "identity": 2}'):
        (tmp_path / NAME).write_bytes(save({}, {"training": text}))
        assert Checkpoint.peek(tmp_path) is None
        with pytest.raises(ArtifactError, match="damaged"):
            trained()
    (tmp_path / NAME).write_bytes(b"\xff" * 8)
    assert Checkpoint.peek(tmp_path) is None


def test_a_disk_that_takes_nothing(trained, tmp_path, monkeypatch):
    (tmp_path / NAME).unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BatchverifyError, match=rf"{NAME}: the checkpoint cannot be written: No space left"):
        trained()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("trained")
def test_the_file_holds_tensors_and_json(tmp_path):
    with safe_open(tmp_path / NAME, "pt") as file:
        about = json.loads(file.metadata()["training"])
        names = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    assert names == {"learner", "best", "optimiser"}
    assert about["epoch"] == 3 and len(about["epochs"]) == 3
    assert Checkpoint.read(tmp_path, about["identity"]).progress["best_epoch"] == about["best_epoch"]
    assert Checkpoint.read(tmp_path / "none", "x") is None


def test_parts_of_a_checkpoint():
    tensors = {"weight": torch.ones(2), "a.bias": torch.zeros(1)}
    checkpoint = Checkpoint("x", {**named("one", tensors), **named("other", {"weight": torch.zeros(1)})})
    assert checkpoint.part("one") == tensors
