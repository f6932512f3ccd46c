"""`finetune`: the last blocks of a backbone, trained on labelled pairs; a weights file, its record and its model card."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from batchverify.embedding.backbone import METADATA_KEY, Backbone, fingerprint, load_weights
from batchverify.embedding.embedder import Embedder
from batchverify.errors import UsageError
from batchverify.options import FinetuneOptions
from batchverify.progress import duration
from batchverify.scoring.job import Job, backbone_options
from batchverify.scoring.job_folder import JobFolder, differences
from batchverify.scoring.parquet import writing
from batchverify.scoring.score import check_failed, embed_job
from batchverify.storage.location import Location
from batchverify.training.finetuning.activations import Activations
from batchverify.training.finetuning.face_sets import FaceSet, check_images_apart, check_people_apart
from batchverify.training.finetuning.fit import FinetuneFit, fit, unit_vectors
from batchverify.training.finetuning.guard import Comparison, compare_backbones
from batchverify.training.finetuning.model_card import model_card
from batchverify.training.finetuning.trainable import TrainedPart
from batchverify.training.train import TrainingLog, check_labels, head_target, log_left_out
from batchverify.version import __version__

# What the work folder holds beside the state and the lock.
DATA = "data"


def finetune(
    train: Any, dev: Any, output: str | Path, options: FinetuneOptions | None = None, **changes: Any
) -> FinetuneSummary:
    """Train the last blocks of a backbone on the labelled pairs of a manifest; write the new backbone.

    train, dev: manifests as for `score`, with a label in every row; columns person_a and person_b name people.
    output: path of the weights, ending in `.safetensors`. Beside it are written a record, ending in `.finetune.json`,
    and a model card, ending in `.md`. Options are a `FinetuneOptions`, keyword arguments of its fields, or both.
    `options.test` names a third manifest, on which both backbones are only measured.

    After a kill the same call goes on where it was; until the end `OUTPUT.job` keeps what is done.
    Raises `ManifestError` and `UsageError` for bad input, `TrainingError` if the network cannot learn.
    """
    started = time.monotonic()
    options = replace(options or FinetuneOptions(), **changes)
    target = _target(output)
    backbone = _parent(options)
    jobs = _open(train, dev, options)
    folder = JobFolder(target)
    with TrainingLog(options.epochs, quiet=options.quiet) as log, folder.claimed():
        _begin(folder, _document(jobs, options), overwrite=options.overwrite)
        data = Path(folder.location.path) / DATA
        work = _Work(backbone, options, data, log)
        sets = work.collect(jobs)
        tuned = work.train(sets)
        comparisons = work.compare(sets, tuned)
        summary = _write(target, work, sets, tuned, comparisons, started)
        shutil.rmtree(data, ignore_errors=True)
        folder.remove()
    return summary


@dataclass(frozen=True)
class FinetuneSummary:
    """The outcome of a fine-tuning.

    pairs, images, left_out: numbers by set. trained, parameters: numbers that were trained, and of the whole network.
    comparisons: fields of `guard.Comparison` by set. epochs: one mapping each.
    """

    parent: str
    unfreeze: str
    loss: str
    pairs: Mapping[str, int]
    images: Mapping[str, int]
    left_out: Mapping[str, int]
    trained: int
    parameters: int
    max_lr: float
    epochs: Sequence[Mapping[str, Any]]
    best_epoch: int
    comparisons: Mapping[str, Mapping[str, Any]]
    helped: bool
    verdicts: Sequence[str]
    fingerprint: str
    seconds: float
    backbone: str
    record: str
    card: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return dict(vars(self))

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        left_out = sum(self.left_out.values())
        counts = ", ".join(f"{name} {count:,}" for name, count in self.pairs.items())
        images = ", ".join(f"{name} {count:,}" for name, count in self.images.items())
        return [
            ("pairs", counts + (f"; {left_out:,} left out" if left_out else "")),
            ("images", images),
            ("trained", f"{self.unfreeze} of {self.parent}: {self.trained:,} of {self.parameters:,} numbers"),
            ("loss", f"{self.loss}, max lr {self.max_lr:.2g}"),
            ("epochs", f"{len(self.epochs) - 1}, the best is {self.best_epoch}"),
            *(("verdict", sentence) for sentence in self.verdicts),
            ("time", duration(self.seconds)),
            ("written to", f"{self.backbone}, {self.record}, {self.card}"),
        ]


@dataclass(frozen=True)
class _Work:
    """The steps of a fine-tuning, whose results lie in `data`."""

    backbone: Backbone
    options: FinetuneOptions
    data: Path
    log: TrainingLog

    def collect(self, jobs: Mapping[str, Job]) -> list[FaceSet]:
        """The faces and pairs of all sets, checked."""
        options, first = self.options, next(iter(jobs.values()))
        embedder = Embedder(
            self.backbone,
            **{name: getattr(first.settings, name) for name in _SETTINGS},
            device=options.device,
            runtime=options.runtime,
        )
        sets = []
        for name, job in jobs.items():
            faces = FaceSet.collect(name, job, embedder, self.data / name)
            log_left_out(faces, self.log)
            sets.append(faces)
        check_images_apart(sets)
        return sets

    def train(self, sets: Sequence[FaceSet]) -> _Tuned:
        """The network after its best epoch."""
        options = self.options
        network = TrainedPart(
            self.backbone,
            options.unfreeze,
            dropout=options.dropout,
            train_statistics=options.train_statistics,
        )
        activations = [
            Activations.computed(
                each.crops,
                network.frozen,
                options.augment if each is sets[0] else 0,
                self.data / each.name,
                quiet=options.quiet,
            )
            for each in sets
        ]
        frozen = [unit_vectors(network, each) for each in activations]
        fitted = fit(
            network,
            *activations[:2],
            *(each.pairs for each in sets[:2]),
            options,
            self.data,
            self._report,
            self._teacher(sets[0]),
        )
        tuned = [unit_vectors(network, each) for each in activations]
        return _Tuned(network, fitted, frozen, tuned)

    def compare(self, sets: Sequence[FaceSet], tuned: _Tuned) -> dict[str, Comparison]:
        """Both backbones on each set but the first."""
        vectors = zip(tuned.frozen_vectors, tuned.vectors, strict=True)
        pairs = list(zip(sets, vectors, strict=True))[1:]
        return {each.name: compare_backbones(each.pairs, *both) for each, both in pairs}

    def _teacher(self, faces: FaceSet) -> np.ndarray | None:
        """(M, D) unit vectors of the training images by `--teacher`: of several backbones joined, of equal weight."""
        if self.options.teacher is None:
            return None
        job = Job.open(faces.job.manifest, replace(self.options.as_embedding(), backbone=self.options.teacher))
        tables = [embed_job(member)[1].vectors.astype(np.float32) for member in job.members]
        vectors = np.concatenate(tables, axis=1) / np.float32(np.sqrt(len(tables)))
        return vectors
