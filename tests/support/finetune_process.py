"""A training in a process of its own, which is killed at a given moment."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetune_samples import DIMENSION, SmallNetwork, people_set, quick
from safetensors.torch import save

from batchverify.training.finetuning import fit
from batchverify.training.finetuning.checks import finite
from batchverify.training.finetuning.fit import FinetuneTask, StoredPairs

# The first optimiser of a process loads a second's worth of modules: before it is forked, for all that follow.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()


def die_at(moment: tuple[str, int]) -> Callable[[], None]:
    """Kill this process (SIGKILL) at the so-manieth call of what is returned, or before or after a file appears.

    moment: `step`, `before` or `after`, and a number from 1.
    """
    kind, left = moment
    counts = {"step": 0, "before": 0, "after": 0}

    def count(name: str) -> None:
        counts[name] += 1
        if name == kind and counts[name] == left:
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def counted(temporary: Path, target: Path) -> None:
        count("before")
        replace(temporary, target)
        count("after")

    os.replace = counted  # type: ignore[assignment]
    return lambda: count("step")


def train_small(folder: Path, moment: tuple[str, int], threads: int, changes: dict[str, Any]) -> None:
    """Train in a process of its own, which dies at a moment of `die_at`; the end is `end.safetensors`."""
    torch.set_num_threads(threads)
    step = die_at(moment)
    train, dev = StoredPairs(*people_set(24, 1, views=2)), StoredPairs(*people_set(12, 2, "dev"))
    teacher = np.eye(DIMENSION, dtype=np.float32)[train.pairs.people % DIMENSION]
    options = quick(**{"max_lr": None, "accumulate": 2, "checkpoint_steps": 4, "dropout": 0.3} | changes)
    network = SmallNetwork(dropout=0.3)
    task = FinetuneTask(network, train, dev, options, folder, None if options.teacher is None else teacher)
    # What every step of an epoch ends with.
    fit.finite = lambda *loss: step() or finite(*loss)  # type: ignore[attr-defined]
    result = fit.fit(task)
    about = [(epoch.loss, epoch.dev_auc, epoch.lr) for epoch in result.epochs]
    text = json.dumps([about, result.best_epoch, result.range_test and asdict(result.range_test)])
    (folder / "end.json").write_text(text)
    (folder / "end.safetensors").write_bytes(save(dict(network.state_dict())))
