"""The training of a network's unfrozen blocks: rates, steps, epochs, early stopping, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from batchverify.embedding.forward import is_out_of_memory
from batchverify.errors import ArtifactError, BatchverifyError, TrainingError, UsageError
from batchverify.options import FinetuneOptions
from batchverify.runtime.devices import resolve_device
from batchverify.training.finetuning.checkpoint import (
    Checkpoint,
    copied,
    digest_of,
    moments_of,
    named,
    require_alike,
    restore_moments,
    sound,
)
from batchverify.training.finetuning.checks import finite, overfit_check, range_test
from batchverify.training.finetuning.learner import (
    Learner,
    batches_of,
    multiplies_bfloat16,
    set_rate,
    untrained_loss,
)
from batchverify.training.finetuning.losses import ArcFaceLoss, PairLoss, WeightedSum
from batchverify.training.finetuning.sets import Batch, LabelledImages
from batchverify.training.finetuning.team import Team
from batchverify.training.finetuning.vectors import Stored, auc_of, embedded, of_batch
from batchverify.training.learning_rate import RangeTest, one_cycle
from batchverify.training.pairs import require_both_labels

# The options that decide what a training ends with; a checkpoint is of them.
DECIDING = (
    *("unfreeze", "loss", "teacher_weight", "epochs", "patience", "max_lr", "lr_decay", "weight_decay"),
    *("dropout", "batch_images", "augment", "train_statistics", "seed", "margin_loss"),
)


@dataclass(frozen=True)
class FinetuneEpoch:
    """One pass over the training set, and the AUC of cosines on dev after it. Epoch 0 is the frozen backbone.

    loss: the mean over the steps, None for epoch 0. lr: the rate of the last block at the epoch's start.
    """

    epoch: int
    loss: float | None
    dev_auc: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class FinetuneFit:
    """A finished training. The network holds the weights of the best epoch; 0 is the frozen backbone."""

    epochs: list[FinetuneEpoch]
    best_epoch: int
    max_lr: float
    range_test: RangeTest | None

    @property
    def frozen_auc(self) -> float:
        """AUC on dev of the frozen backbone."""
        return self.epochs[0].dev_auc

    @property
    def helped(self) -> bool:
        """Whether an epoch did better on dev than the frozen backbone."""
        return self.best_epoch > 0


Report = Callable[[FinetuneEpoch], None]


class StoredPairs(NamedTuple):
    """Labelled pairs, and the activations of their images."""

    stored: Stored
    pairs: LabelledImages


@dataclass(frozen=True)
class FinetuneTask:
    """What a training is given.

    network: learns in place. folder: for the checkpoint. teacher: (M, T) float32 unit rows by training image. frozen:
    (M, D) float32 unit rows by dev image that the network gives before it learns; computed if None.
    """

    network: nn.Module
    train: StoredPairs
    dev: StoredPairs
    options: FinetuneOptions
    folder: Path
    teacher: np.ndarray | None = None
    frozen: np.ndarray | None = None


def fit(task: FinetuneTask, report: Report = lambda _: None, *, team: Team | None = None) -> FinetuneFit:
    """Train the network of a task and leave it with the weights of the epoch that does best on dev.

    A call with the same task goes on from the checkpoint, reports the epochs before again and ends, on a CPU, with
    the same bits as if it had not been interrupted. team: the processes that train together, None for this one alone.
    Raises `UsageError` for sets that do not fit the loss or the batches, `ArtifactError` for a checkpoint of another
    training, and `TrainingError` if the overfit check fails, a loss is not finite or memory runs out.
    """
    team = team or Team(torch.device(resolve_device(task.options.device)))
    for _, pairs in (task.train, task.dev):
        require_both_labels(pairs.name, pairs.labels)
    task.network.to(team.device)
    devices = [team.device] if team.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _memory_errors(task.options):
        return _Training(task, team).run(report)


def finished(network: nn.Module, folder: Path) -> FinetuneFit:
    """What a training ended with whose last checkpoint is in a folder; the network gets its weights.

    Raises `ArtifactError` if there is no checkpoint or a damaged one.
    """
    checkpoint = Checkpoint.read(folder)
    if checkpoint is None:
        raise ArtifactError(f"{folder}: the checkpoint of the workers is not there: all nodes must see this folder")
    with sound(folder):
        require_alike(checkpoint.part("best"), network.state_dict())
        progress = Progress.of_json(checkpoint.progress)
    return _finished(network, checkpoint.part("best"), progress)


def _finished(network: nn.Module, best: dict[str, torch.Tensor], progress: Progress) -> FinetuneFit:
    network.load_state_dict(best)
    network.eval()
    return FinetuneFit(progress.epochs, progress.best_epoch, progress.max_lr, progress.range_test)


@dataclass
class Progress:
    """How far a training is.

    steps, total: steps of an epoch and of all. epoch, step: the next one. loss, seconds: sums of the epoch so far.
    """

    steps: int
    total: int
    max_lr: float
    range_test: RangeTest | None
    epochs: list[FinetuneEpoch]
    best_epoch: int = 0
    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """The steps done, of `total`."""
        return (self.epoch - 1) * self.steps + self.step

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Progress:
        """From what `asdict` gave. Raises `LookupError`, `TypeError` and `ValueError` for anything else."""
        tested = values.pop("range_test")
        epochs = [FinetuneEpoch(**epoch) for epoch in values.pop("epochs")]
        progress = cls(range_test=tested and RangeTest(**tested), epochs=epochs, **values)
        counts = (progress.steps, progress.total, progress.best_epoch, progress.epoch, progress.step)
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"counts {counts}")
        sums = (progress.max_lr, progress.loss, progress.seconds, *(epoch.dev_auc for epoch in epochs))
        if not all(isinstance(value, float | int) and math.isfinite(value) for value in sums):
            raise ValueError(f"numbers {sums}")
        if progress.epoch != len(epochs) or progress.best_epoch >= len(epochs) or progress.step > progress.steps:
            raise ValueError(f"epoch {progress.epoch} of {len(epochs)}")
        return progress


@dataclass
class _Training:
    """What a training consists of, and its steps."""

    task: FinetuneTask
    team: Team
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options, (stored, pairs) = self.task.options, self.task.train
        self.batches = batches_of(options, pairs)
        self.passes = options.accumulate * self.team.size
        self.steps = len(self.batches) // self.passes
        if not self.steps:
            raise UsageError(
                f"--accumulate {options.accumulate} and --workers {self.team.size} take {self.passes} batches a "
                f"step, but the {pairs.name} set fills only {len(self.batches)} of --batch-images "
                f"{options.batch_images}: give smaller numbers"
            )
        mixed = multiplies_bfloat16(options.dtype, self.team.device)
        self.identity = self._identity(mixed)
        self.learner = Learner(self.task.network, nn.Identity(), mixed=mixed)
        one = embedded(self.learner, stored, pairs.images[:1], 1, Team(self.team.device))
        self.learner.loss = untrained_loss(options, pairs, self.task.teacher, one.shape[1]).to(self.team.device)

    def run(self, report: Report) -> FinetuneFit:
        """Begin, or go on, and come to the end."""
        checkpoint = Checkpoint.read(self.task.folder, self.identity)
        with sound(self.task.folder):
            there = None if checkpoint is None else Progress.of_json(dict(checkpoint.progress))
        self._check_seen_by_all(there)
        progress = there or self._begun()
        optimiser = self.learner.optimiser(self.task.options)
        if checkpoint is None:
            self._save(progress, optimiser)
        else:
            with sound(self.task.folder):
                self._restore(checkpoint, progress, optimiser)
        for epoch in progress.epochs:
            report(epoch)
        # Only now: with it the members get the first one's weights.
        joined = self.team.joined(self.learner)
        while not self._is_over(progress):
            self._run_epoch(progress, joined, optimiser)
            report(progress.epochs[-1])
        return _finished(self.task.network, self.best, progress)

    def _check_seen_by_all(self, there: Progress | None) -> None:
        """Raise `BatchverifyError` unless all members read the same checkpoint."""
        done = -1 if there is None else there.done
        if self.team.of_first(done) != done:
            raise BatchverifyError(
                f"{self.task.folder}: worker {self.team.rank} finds another checkpoint here than worker 0: all nodes "
                "must see the same folder"
            )

    def _begun(self) -> Progress:
        """The frozen backbone's epoch, and the checks."""
        options, (stored, pairs), started = self.task.options, self.task.train, time.perf_counter()
        frozen = FinetuneEpoch(0, None, self._dev_auc(0), 0.0, time.perf_counter() - started)
        if isinstance(self.learner.loss, PairLoss | ArcFaceLoss | WeightedSum):
            self.learner.loss.start_from(self._vectors(self.task.train, 0), pairs)
        self.best, tested = copied(self.task.network.state_dict()), None
        start = copied(self.learner.state_dict())
        overfit_check(self.learner, stored, self.batches, options)
        rate = options.max_lr
        if rate is None:
            self.learner.load_state_dict(start)
            self._seed(0, 0)
            tested = range_test(self.learner, stored, self.batches, options)
            rate = self.team.of_first(tested.pick)
        self.learner.load_state_dict(start)
        return Progress(self.steps, options.epochs * self.steps, rate, tested, [frozen])

    def _is_over(self, progress: Progress) -> bool:
        done = progress.epoch - 1
        return done >= self.task.options.epochs or done - progress.best_epoch >= self.task.options.patience

    def _run_epoch(self, progress: Progress, joined: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """The rest of an epoch, with a checkpoint every few steps and at its end."""
        started = time.perf_counter() - progress.seconds
        first_rate = progress.max_lr * one_cycle(progress.done - progress.step, progress.total)
        self.learner.train()
        for batches in self._steps_from(progress.epoch, progress.step):
            set_rate(optimiser, progress.max_lr * one_cycle(progress.done, progress.total))
            loss = self._step(joined, optimiser, batches, progress)
            progress.loss += finite(loss, f"epoch {progress.epoch}, step {progress.step + 1}")
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            if progress.step % self.task.options.checkpoint_steps == 0 and progress.step < self.steps:
                self._save(progress, optimiser)
        self.team.level(self.task.network)
        auc = self._dev_auc(progress.epoch)
        seconds = time.perf_counter() - started
        epoch = FinetuneEpoch(progress.epoch, progress.loss / self.steps, auc, first_rate, seconds)
        if auc > progress.epochs[progress.best_epoch].dev_auc:
            progress.best_epoch, self.best = epoch.epoch, copied(self.task.network.state_dict())
        progress.epochs.append(epoch)
        progress.epoch, progress.step, progress.loss, progress.seconds = epoch.epoch + 1, 0, 0.0, 0.0
        self._save(progress, optimiser)

    def _steps_from(self, epoch: int, step: int) -> Iterator[list[Batch]]:
        """The batches of each step of an epoch, from a step on."""
        batches = islice(self.batches.epoch(epoch, self.task.train.stored.views), step * self.passes, None)
        for _ in range(step, self.steps):
            yield list(islice(batches, self.passes))

    def _step(
        self,
        joined: nn.Module,
        optimiser: torch.optim.Optimizer,
        batches: list[Batch],
        progress: Progress,
    ) -> float:
        """A step on this member's share of the batches; the mean loss of all."""
        team, device = self.team, self.team.device
        mine = batches[team.rank :: team.size]
        optimiser.zero_grad()
        losses = torch.zeros(len(mine), dtype=torch.float64, device=device)
        for index, batch in enumerate(mine):
            self._seed(progress.epoch, progress.step * self.passes + index * team.size + team.rank)
            is_last = index == len(mine) - 1
            with nullcontext() if is_last else team.apart(joined):
                loss = joined(of_batch(self.task.train.stored, batch, device), batch)
                (loss / len(mine)).backward()
            losses[index] = loss.detach()
        optimiser.step()
        return float(team.total(losses.sum())) / self.passes

    def _seed(self, epoch: int, number: int) -> None:
        """Make the draws of a pass depend on nothing but its number."""
        state = np.random.SeedSequence((self.task.options.seed, epoch, number)).generate_state(2, np.uint32)
        torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)

    def _dev_auc(self, epoch: int) -> float:
        known = None if epoch else self.task.frozen
        return auc_of(self._vectors(self.task.dev, epoch, known), self.task.dev.pairs)

    def _vectors(self, images: StoredPairs, epoch: int, known: np.ndarray | None = None) -> np.ndarray:
        """(M, D) unit rows of a set after an epoch, or those known. Raises `TrainingError` if one is not finite."""
        stored, pairs = images
        size = self.task.options.batch_images
        vectors = embedded(self.learner, stored, pairs.images, size, self.team) if known is None else known
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            what = f"the vectors of {len(bad):,} {pairs.name} images (first: image {bad[0]}) are not finite"
            if epoch:
                raise TrainingError(f"{what} after epoch {epoch}: give a smaller --max-lr")
            raise TrainingError(f"{what} before training: look for broken weights")
        return vectors

    def _save(self, progress: Progress, optimiser: torch.optim.Optimizer) -> None:
        if self.team.rank:
            return
        tensors = {
            **named("learner", self.learner.state_dict()),
            **named("best", self.best),
            **named("optimiser", moments_of(optimiser)),
        }
        Checkpoint(self.identity, tensors, asdict(progress)).write(self.task.folder)

    def _restore(self, checkpoint: Checkpoint, progress: Progress, optimiser: torch.optim.Optimizer) -> None:
        """Raises what `sound` expects for a checkpoint that does not fit."""
        if (progress.steps, progress.total) != (self.steps, self.task.options.epochs * self.steps):
            raise ValueError(f"{progress.steps} steps of {progress.total}")
        require_alike(checkpoint.part("learner"), self.learner.state_dict())
        require_alike(checkpoint.part("best"), self.task.network.state_dict())
        self.learner.load_state_dict(checkpoint.part("learner"))
        restore_moments(optimiser, checkpoint.part("optimiser"))
        self.best = checkpoint.part("best")

    def _identity(self, mixed: bool) -> str:
        """A hash of all that decides what the training ends with."""
        of_teacher = None if self.task.teacher is None else hashlib.sha256(self.task.teacher.tobytes()).hexdigest()
        about = {
            "options": {name: getattr(self.task.options, name) for name in DECIDING},
            "mixed": mixed,
            "passes": self.passes,
            "sets": [pairs.digest() for _, pairs in (self.task.train, self.task.dev)],
            "views": self.task.train.stored.views,
            "network": digest_of(self.task.network),
            "teacher": of_teacher,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextmanager
def _memory_errors(options: FinetuneOptions) -> Iterator[None]:
    """Errors of too little memory as `TrainingError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not (isinstance(exc, MemoryError) or is_out_of_memory(exc)):
            raise
        raise TrainingError(
            f"not enough memory for --batch-images {options.batch_images}: give fewer, with a larger "
            "--accumulate for as many images a step, or unfreeze fewer blocks"
        ) from exc
