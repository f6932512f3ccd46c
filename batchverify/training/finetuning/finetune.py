"""`finetune`: the last blocks of a backbone, trained on labelled pairs; weights, their record, their model card."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import nn

from batchverify.embedding.backbone import (
    FACE_SETTINGS,
    METADATA_KEY,
    SETTINGS_KEY,
    Backbone,
    fingerprint,
    fused_names,
    load_backbone,
)
from batchverify.embedding.embedder import Embedder
from batchverify.embedding.onnx_export import origin_of
from batchverify.errors import BatchverifyError, TrainingError, UsageError
from batchverify.fingerprint import CHOSEN
from batchverify.options import FinetuneOptions
from batchverify.progress import duration
from batchverify.runtime.devices import resolve_device
from batchverify.scoring.job import Job
from batchverify.scoring.job_folder import JobFolder, shown_differences
from batchverify.scoring.parquet import writing
from batchverify.scoring.score import embed_job
from batchverify.storage.location import Location
from batchverify.training.finetuning.activations import Activations
from batchverify.training.finetuning.checkpoint import NAME as CHECKPOINT
from batchverify.training.finetuning.distributed import check_installed, fit_on_workers
from batchverify.training.finetuning.face_crops import Report
from batchverify.training.finetuning.face_sets import FaceSet, check_images_apart, check_people_apart
from batchverify.training.finetuning.fit import FinetuneEpoch, FinetuneFit, FinetuneTask, StoredPairs
from batchverify.training.finetuning.guard import Comparison, compare_backbones
from batchverify.training.finetuning.learner import Learner, check_people, multiplies_bfloat16
from batchverify.training.finetuning.losses import joined_teacher
from batchverify.training.finetuning.model_card import model_card
from batchverify.training.finetuning.team import Team
from batchverify.training.finetuning.trainable import BLOCKS, TrainedPart, trainable
from batchverify.training.finetuning.vectors import embedded
from batchverify.training.pairs import people_of
from batchverify.training.train import TrainingLog, head_target, log_left_out, open_sets
from batchverify.version import __version__

logger = logging.getLogger(__name__)

# The folder in the job folder that holds faces, activations and the checkpoint.
DATA = "data"
# Between two lines that say how much is done.
SHOW_SECONDS = 10.0
# Options that do not change the weights, or that the document names otherwise.
OTHER = (
    *("cache", "no_cache", "quiet", "verbose", "backbone", "weights", "test", "image_root", "retry_failed"),
    *("overwrite", "engine", "address", "num_cpus", "details", "max_failed", "checkpoint_steps"),
)


def finetune(
    train: Any, dev: Any, output: str | Path, options: FinetuneOptions | None = None, **changes: Any
) -> FinetuneSummary:
    """Train the last blocks of a backbone on the labelled pairs of a manifest; write the new backbone.

    train, dev: manifests as for `score`, with a label in every row; columns person_a and person_b name people.
    output: path of the weights, ending in `.safetensors`. Beside it are written a record, ending in `.finetune.json`,
    and a model card, ending in `.md`. Options are a `FinetuneOptions`, keyword arguments of its fields, or both.
    `options.test` names a third manifest, on which both backbones are only measured.

    After a kill the same call goes on where it was; until the end `OUTPUT.job` keeps what is done.
    Raises `ManifestError` and `UsageError` for bad input, `TrainingError` if the network cannot learn, or if no epoch
    does better on dev than the backbone does as it is.
    """
    started = time.monotonic()
    options = replace(options or FinetuneOptions(), **changes)
    target = _target(output)
    backbone = _parent(options)
    options = replace(options, unfreeze=options.unfreeze or BLOCKS[backbone.architecture][0])
    # What does not fit is found before faces are cut out of thousands of images.
    network = TrainedPart(
        backbone,
        str(options.unfreeze),
        dropout=options.dropout,
        train_statistics=options.train_statistics,
    )
    if options.workers > 1:
        check_installed()
    jobs = _open(train, dev, options)
    folder = JobFolder(target)
    with TrainingLog(options.epochs, quiet=options.quiet) as log, _on_disk(folder), folder.claimed():
        data = _begin(folder, _document(jobs, options), overwrite=options.overwrite)
        run = _Run(backbone, options, data, log)
        sets = run.faces(jobs)
        tuned = run.tuned(network, sets, _teacher(train, options))
        summary = _write(target, run, sets, tuned, round(time.monotonic() - started, 2))
        shutil.rmtree(data, ignore_errors=True)
        if data.exists():
            logger.warning("%s: cannot be deleted and is left, with the faces of the images: delete it", data)
        folder.remove()
    return summary


@dataclass(frozen=True)
class FinetuneSummary:
    """The outcome of a fine-tuning.

    pairs, images, left_out: numbers by set. trained, parameters: numbers that were trained, and of the whole network.
    comparisons: fields of `guard.Comparison` by set. helped: whether the gain on dev is beyond chance. epochs: one
    mapping each; 0 is the frozen backbone.
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
        return [
            ("pairs", counts + (f"; {left_out:,} left out" if left_out else "")),
            ("images", ", ".join(f"{name} {count:,}" for name, count in self.images.items())),
            ("trained", f"{self.unfreeze} of {self.parent}: {self.trained:,} of {self.parameters:,} numbers"),
            ("loss", f"{self.loss}, max lr {self.max_lr:.2g}"),
            ("epochs", f"{len(self.epochs) - 1}, the best is {self.best_epoch}"),
            *(("verdict", sentence) for sentence in self.verdicts),
            ("time", duration(self.seconds)),
            ("written to", f"{self.backbone}, {self.record}, {self.card}"),
        ]


@dataclass(frozen=True)
class _Tuned:
    """A finished training.

    before, after: (M, D) unit vectors of each set but the first, by the frozen and the new backbone.
    """

    network: TrainedPart
    fit: FinetuneFit
    before: Sequence[np.ndarray]
    after: Sequence[np.ndarray]

    def compared(self, sets: Sequence[FaceSet]) -> dict[str, Comparison]:
        """Both backbones on all sets but the training pairs."""
        together = zip(sets[1:], self.before, self.after, strict=True)
        return {each.name: compare_backbones(each.pairs, *vectors) for each, *vectors in together}


@dataclass(frozen=True)
class _Run:
    """The steps of a fine-tuning, whose results lie in `data`."""

    backbone: Backbone
    options: FinetuneOptions
    data: Path
    log: TrainingLog

    def faces(self, jobs: Mapping[str, Job]) -> list[FaceSet]:
        """The faces and pairs of all sets, checked against each other."""
        first, options = next(iter(jobs.values())), self.options
        settings = {name: getattr(first.settings, name) for name in CHOSEN}
        embedder = Embedder(self.backbone, **settings, device=options.device, runtime=options.runtime)
        sets = []
        for name, job in jobs.items():
            faces = FaceSet.collect(name, job, embedder, self.data / name / "faces", self._counter(f"{name} faces"))
            log_left_out(name, faces.left_out, self.log)
            faces.check_failed(options.max_failed)
            sets.append(faces)
        check_images_apart(sets)
        return sets

    def tuned(self, network: TrainedPart, sets: Sequence[FaceSet], teacher: np.ndarray | None) -> _Tuned:
        """Train the network; it holds its best epoch then."""
        options = self.options
        device = torch.device(resolve_device(options.device))
        network.frozen.to(device, mixed=multiplies_bfloat16(options.dtype, device))
        network.to(device)
        activations = [
            Activations.computed(
                each.crops,
                network.frozen,
                options.augment if each is sets[0] else 0,
                self.data / each.name / "activations",
                progress=self._counter(f"{each.name} activations"),
            )
            for each in sets
        ]
        train, *measured = map(StoredPairs, activations, [each.pairs for each in sets])
        before = self._vectors(network, measured, device)
        task = FinetuneTask(network, train, measured[0], options, self.data, teacher, frozen=before[0])
        fitted = fit_on_workers(task, self._report)
        network.to(device)
        if not fitted.helped:
            raise TrainingError(
                f"fine-tuning did not help, so nothing is written: the best of {len(fitted.epochs) - 1} epochs has "
                f"AUC {max(each.dev_auc for each in fitted.epochs[1:]):.5f} on dev, the frozen backbone "
                f"{fitted.frozen_auc:.5f}. Try a smaller --max-lr, other blocks (--unfreeze), more --augment, or "
                f"another --loss, with --overwrite: {self.data.parent} keeps the faces for that; otherwise delete it"
            )
        return _Tuned(network, fitted, before, self._vectors(network, measured, device))

    def _vectors(self, network: TrainedPart, sets: Sequence[StoredPairs], device: torch.device) -> list[np.ndarray]:
        """(M, D) float32 unit rows of each set's images, by the network as it is now."""
        learner, team = Learner(network, nn.Identity()), Team(device)
        size = self.options.batch_images
        return [embedded(learner, stored, pairs.images, size, team) for stored, pairs in sets]

    def _counter(self, name: str) -> Report:
        """Writes how much of a long step is done, every few seconds."""
        shown = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                self.log.write(f"{name}: {done:,} of {total:,}")

        return report

    def _report(self, epoch: FinetuneEpoch) -> None:
        if epoch.loss is None:
            self.log.write(f"frozen backbone: dev AUC {epoch.dev_auc:.5f}")
            return
        self.log.write(
            f"epoch {epoch.epoch}/{self.options.epochs}  loss {epoch.loss:.4f}  dev AUC {epoch.dev_auc:.5f}  "
            f"lr {epoch.lr:.2g}  {duration(epoch.seconds)}"
        )


def _target(output: str | Path) -> Location:
    """Where the weights go; a file of this machine, since the work beside it must lie on a disk."""
    target = head_target(output)
    if not target.is_local:
        raise UsageError(f"--output {output}: name a file on this machine; it can be copied once it is finished")
    return target


def _parent(options: FinetuneOptions) -> Backbone:
    """The backbone to start from; `UsageError` for one that cannot be trained."""
    if len(fused_names(options.backbone)) > 1:
        raise UsageError(f"--backbone {options.backbone}: fine-tune one backbone at a time; --teacher takes several")
    return trainable(load_backbone(options.backbone, Path(options.weights) if options.weights else None))


def _open(train: Any, dev: Any, options: FinetuneOptions) -> dict[str, Job]:
    """The manifests, checked before anything is read from images."""
    jobs = open_sets(train, dev, options)
    people = {name: people_of(job.manifest, job.scan) for name, job in jobs.items()}
    check_people(options, "training", known=len(people["training"]))
    check_people_apart(people)
    return jobs


def _document(jobs: Mapping[str, Job], options: FinetuneOptions) -> dict[str, Any]:
    """Everything that changes the weights."""
    first, deciding = next(iter(jobs.values())), {name: jobs[name] for name in ("training", "dev")}
    chosen = {name: value for name, value in options.as_record().items() if name not in OTHER}
    return {
        "finetune": chosen,
        "embedding": dict(first.fingerprint.document),
        "manifests": {name: job.manifest_fingerprint for name, job in deciding.items()},
        "image_roots": {name: list(job.manifest.roots) for name, job in deciding.items()},
    }


@contextmanager
def _on_disk(folder: JobFolder) -> Iterator[None]:
    """Errors of the system, which concern the job folder, as `BatchverifyError`; images that fail are no errors."""
    try:
        yield
    except OSError as exc:
        raise BatchverifyError(
            f"{folder.location}: cannot be written or read: {exc.strerror or exc}; the same command goes on from here"
        ) from exc


def _begin(folder: JobFolder, document: dict[str, Any], *, overwrite: bool) -> Path:
    """The folder with the data of this job; `UsageError` if another job's is half done there.

    Faces and activations know what they were computed from: a new job takes those that fit.
    """
    data, state = Path(folder.location.path) / DATA, folder.state()
    document = json.loads(json.dumps(document))
    if state is not None and state["job"] != document and not overwrite:
        raise UsageError(
            f"{folder.location}: holds another fine-tuning half done ({shown_differences(state['job'], document)}): "
            "give another output with -o, finish that one, or start anew with --overwrite"
        )
    if state is None or state["job"] != document or overwrite:
        (data / CHECKPOINT).unlink(missing_ok=True)
        folder.write_state({"job": document, "token": uuid.uuid4().hex})
    data.mkdir(exist_ok=True)
    return data


def _teacher(train: Any, options: FinetuneOptions) -> np.ndarray | None:
    """(M, T) float32 unit rows of the training images by `--teacher`, zeros where it finds no face."""
    if options.teacher is None:
        return None
    # The teacher has a crop and a detector of its own.
    of_teacher = replace(
        options, backbone=options.teacher, weights=None, dtype="auto", crop=None, margin=None, detector=None
    )
    job = Job.open(train, of_teacher)
    vectors = [embed_job(member)[1].vectors for member in job.members]
    known = np.all([member.any(axis=1) for member in vectors], axis=0)
    return np.asarray(joined_teacher(vectors) * known[:, None], np.float32)


def _write(target: Location, run: _Run, sets: Sequence[FaceSet], tuned: _Tuned, seconds: float) -> FinetuneSummary:
    """Write weights, record and card, the weights last."""
    options, backbone, tensors = run.options, run.backbone, tuned.network.tensors()
    compared = tuned.compared(sets)
    stem = target.name.removesuffix(target.suffix)
    record_path, card_path = (target.parent.join(f"{stem}{ending}") for ending in (".finetune.json", ".md"))
    summary = FinetuneSummary(
        parent=options.backbone,
        unfreeze=str(options.unfreeze),
        loss=options.loss if options.teacher is None else f"{options.loss}, teacher {options.teacher}",
        pairs={each.name: len(each.pairs) for each in sets},
        images={each.name: len(each.pairs.images) for each in sets},
        left_out={each.name: len(each.left_out) for each in sets},
        trained=sum(parameter.numel() for parameter in tuned.network.parameters()),
        parameters=sum(array.size for array in tensors.values()),
        max_lr=tuned.fit.max_lr,
        epochs=[asdict(epoch) for epoch in tuned.fit.epochs],
        best_epoch=tuned.fit.best_epoch,
        comparisons={name: asdict(each) for name, each in compared.items()},
        helped=compared["dev"].helped,
        verdicts=[each.sentence(name) for name, each in compared.items()],
        fingerprint=fingerprint(tensors, backbone.architecture),
        seconds=seconds,
        backbone=str(target),
        record=str(record_path),
        card=str(card_path),
    )
    licence, _ = origin_of(options.backbone)
    about = {
        "architecture": backbone.architecture,
        "licence": f"of its parent: {licence}; and the terms of the training images",
        "parent": backbone.fingerprint,
        SETTINGS_KEY: {name: getattr(sets[0].job.settings, name) for name in FACE_SETTINGS},
        "source": f"batchverify finetune {__version__} from {backbone.name}",
    }
    card = _card(summary, backbone, sets, str(record_path))
    for location, data in (
        (record_path, json.dumps(_record(summary, run, sets, tuned.fit), indent=1).encode()),
        (card_path, card.encode()),
        (target, save(tensors, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})),
    ):
        with writing(location):
            location.write_bytes(data)
    return summary


def _record(summary: FinetuneSummary, run: _Run, sets: Sequence[FaceSet], fitted: FinetuneFit) -> dict[str, Any]:
    """The record of the training, for the file beside the weights."""
    tested = fitted.range_test
    return {
        "version": __version__,
        **summary.to_json(),
        "parent_fingerprint": run.backbone.fingerprint,
        "embedding": dict(sets[0].job.fingerprint.document),
        "options": run.options.as_record(),
        "manifests": {each.name: each.job.manifest.names for each in sets},
        "image_roots": {each.name: list(each.job.manifest.roots) for each in sets},
        "range_test": asdict(tested) if tested is not None else None,
        "left_out": [{"set": each.name, **asdict(row)} for each in sets for row in each.left_out],
    }


def _card(summary: FinetuneSummary, backbone: Backbone, sets: Sequence[FaceSet], record: str) -> str:
    """The model card."""
    name, settings = Path(summary.backbone).name, sets[0].job.settings
    usual = backbone.spec.defaults
    # The file states the others itself.
    flags = "".join(
        f" --{flag.replace('_', '-')} {getattr(settings, flag)}"
        for flag in ("face", "min_face")
        if getattr(settings, flag) != getattr(usual, flag)
    )
    rows = [
        [set_name, title, f"{figures[area]:.5f}", f"{figures[f'{area}_tar']:.4f}"]
        for set_name, figures in summary.comparisons.items()
        for title, area in (("parent", "frozen"), ("fine-tuned", "tuned"))
    ]
    return model_card(
        {
            **vars(summary),
            "name": name,
            "version": __version__,
            "record": Path(record).name,
            "parent_fingerprint": backbone.fingerprint,
            "size": backbone.spec.size,
            "settings": f"crop {settings.crop}" + (f", detector {settings.detector}" if settings.detects else ""),
            "dimension": backbone.spec.dimension,
            "training": _described(sets[0]),
            "dev": _described(sets[1]),
            "verdict": " ".join(summary.verdicts),
            "figures": rows,
            "flags": flags,
        }
    )


def _described(faces: FaceSet) -> str:
    """A set of pairs in a few words."""
    people = len(np.unique(faces.pairs.people[faces.pairs.people >= 0]))
    named = f" of {people:,} people" if people else " of people without names"
    sources = ", ".join(Path(name).name for name in faces.job.manifest.names[:3])
    return f"{len(faces.pairs):,} pairs of {len(faces.pairs.images):,} images{named} ({sources})"
