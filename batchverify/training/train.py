"""`train`: from labelled manifests to a stored head, with a log, a record and a summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from batchverify.engine.fused_table import FusedTable
from batchverify.errors import NothingScoredError, UsageError
from batchverify.options import FinetuneOptions, TrainOptions
from batchverify.progress import duration, tell
from batchverify.scoring.embedding_run import fused_summary
from batchverify.scoring.job import Job
from batchverify.scoring.parquet import writing
from batchverify.scoring.score import check_failed, embed_job
from batchverify.scoring.summary import EmbedSummary
from batchverify.storage.location import Location, expand_home
from batchverify.training.fit import FEWEST_PAIRS, estimator_specs
from batchverify.training.fuse import FittedHeads, fit_heads, measure_heads
from batchverify.training.network import Epoch
from batchverify.training.pairs import (
    SHOWN,
    LabelledPairs,
    Leak,
    LeftOut,
    check_apart,
    count_labels,
    find_leaks,
    people_of,
    shared_people,
)

SUFFIX = ".safetensors"


def train(
    train: Any, dev: Any, output: str | Path, options: TrainOptions | None = None, **changes: Any
) -> TrainSummary:
    """Fit a head to the labelled pairs of a manifest; write it and a record of the training.

    train, dev: manifests as for `score`, with a label in every row. output: path or URI of the head, ending in
    `.safetensors`; the record is written beside it, ending in `.training.json`. Options are a `TrainOptions`, keyword
    arguments of its fields, or both. `options.test` names a third manifest, on which the head is only measured.

    Raises `ManifestError` and `UsageError` for bad input, `TrainingError` if a network cannot learn.
    """
    started = time.monotonic()
    options = replace(options or TrainOptions(), **changes)
    _check_algorithms(options)
    target = head_target(output)
    with TrainingLog(options.epochs, quiet=options.quiet, tensorboard=options.tensorboard) as log:
        sets = _embed_sets(train, dev, options)
        leaks = _check(sets, options, log)
        training_pairs, view_runs = _with_views(sets[0], options)
        options, trials = _tuned(training_pairs[0], sets[1].pairs, options, log)
        fits = _fit_repeats(sets, training_pairs, options, log)
    seconds = round(time.monotonic() - started, 2)
    record = _record(sets, fits, options, leaks)
    record |= {"views": [run.to_json() for run in view_runs], "tune": trials, "seconds": seconds}
    fitted, _ = fits[0]
    head = fitted.head
    record_path = target.parent.join(f"{PurePosixPath(target.path).stem}.training.json")
    for location, data in ((target, head.to_bytes()), (record_path, json.dumps(record, indent=1).encode())):
        with writing(location):
            location.write_bytes(data)
    return TrainSummary(
        recipes=[f"{scorer.algorithm}:{scorer.features}" for scorer in head.scorers],
        parameters=head.parameters,
        pairs={each.pairs.name: len(each.pairs) for each in sets},
        left_out=len(record["left_out"]),
        embedded=sum(run.embedded for run in (*view_runs, *(each.summary for each in sets))),
        leaks=len(leaks),
        about=head.about,
        metrics=record["metrics"],
        range_tests={name: network.max_lr for name, network in fitted.networks.items()},
        seconds=seconds,
        head=str(target),
        digest=head.digest,
        record=str(record_path),
    )


@dataclass(frozen=True)
class TrainSummary:
    """The outcome of a training.

    recipes: the specs of the head's scorers. pairs: number by set. about: the head's metadata. metrics: one mapping
    per seed, with the fields of `figures.Metrics` by set (`held_out`, `dev`, `test`). range_tests: learning rate by
    network.
    """

    recipes: Sequence[str]
    parameters: int
    pairs: Mapping[str, int]
    left_out: int
    embedded: int
    leaks: int
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    range_tests: Mapping[str, float]
    seconds: float
    head: str
    digest: str
    record: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        about = {name: self.about[name] for name in ("calibration", "thresholds", "training", "embedding")}
        return {**vars(self), "about": about}

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.pairs.items())
        left_out = f"; {self.left_out:,} left out" if self.left_out else ""
        lines = [
            ("pairs", f"{counts}{left_out}"),
            ("images embedded", f"{self.embedded:,}"),
            ("head", f"{' + '.join(self.recipes)}, {self.parameters:,} parameters"),
        ]
        lines += [(f"max lr of {name}", f"{rate:.2g}") for name, rate in self.range_tests.items()]
        names = [name for name in self.metrics[0] if name != "seed"]
        lines += [(name.replace("_", "-"), self._metrics(name)) for name in names]
        calibration, thresholds = self.about["calibration"], self.about["thresholds"]
        before, after = calibration["before"], calibration["after"]
        lines += [
            (
                "calibration",
                f"on {calibration['held_out_pairs']:,} held-out pairs: Brier {before['brier']:.4f} to "
                f"{after['brier']:.4f}, ECE {before['ece']:.4f} to {after['ece']:.4f}",
            ),
            ("threshold", f"{thresholds['best_f1']:.4f} (best expected F1)"),
            (
                "equal error",
                f"rate {thresholds['equal_error']['rate']:.4f} at {thresholds['equal_error']['threshold']:.4f}",
            ),
            ("false accept", self._rates(thresholds)),
            ("with 95 %", self._bounds(thresholds)),
            ("time", duration(self.seconds)),
            ("written to", f"{self.head}, {self.record}"),
        ]
        return lines

    def _metrics(self, name: str) -> str:
        """The metrics of one set, with mean and standard deviation if there are several seeds."""

        def mean(field: str, digits: int) -> str:
            values = [metrics[name][field] for metrics in self.metrics]
            spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
            return f"{np.mean(values):.{digits}f}{spread}"

        return (
            f"AUC {mean('auc', 5)}, F1 {mean('f1', 4)} (best possible {mean('best_f1', 4)}), "
            f"accuracy {mean('accuracy', 4)}, Brier {mean('brier', 4)}, ECE {mean('ece', 4)}"
        )

    @staticmethod
    def _rates(thresholds: Mapping[str, Any]) -> str:
        rates = ", ".join(f"{entry['far']:g} at {entry['threshold']:.4f}" for entry in thresholds["far"])
        pairs = f"{thresholds['different_pairs']:,} different pairs"
        return f"{rates} (of {pairs})" if rates else f"no rate: {pairs} support none"

    @staticmethod
    def _bounds(thresholds: Mapping[str, Any]) -> str:
        """What the thresholds at false accept rates let through at most."""
        bounds = thresholds["bounds"]
        rates = ", ".join(f"{each['bounds']['0.95']:.2g} for {each['far']:g}" for each in thresholds["far"])
        pairs = f"{bounds['different']['pairs']:,} different pairs that share no {bounds['unit']}"
        return f"at most {rates} (of {pairs})" if rates else f"no bound: {pairs}"


class TrainingLog:
    """Writes messages and epochs to stderr, and epochs to TensorBoard if a folder for it is given.

    A context manager. Raises `UsageError` if TensorBoard is not installed or its folder cannot be made.
    """

    def __init__(self, epochs: int, *, quiet: bool = False, tensorboard: str | None = None) -> None:
        self._epochs = epochs
        self._quiet = quiet
        self._writers: dict[str, Any] = {}
        self._open_writer = _tensorboard(tensorboard) if tensorboard is not None else None
        self.seed = 0

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._open_writer is not None and not self._writers and kind is None:
            self.write("warning: --tensorboard: nothing was written, since only networks have epochs")

    def write(self, text: str) -> None:
        """Write a line to stderr unless quiet."""
        if not self._quiet:
            tell(text + "\n")

    def epoch(self, name: str, epoch: Epoch) -> None:
        """Log an epoch of the network called `name`."""
        self.write(
            f"{name}  epoch {epoch.epoch}/{self._epochs}  loss {epoch.loss:.4f}  dev loss {epoch.dev_loss:.4f}  "
            f"dev F1 {epoch.dev_f1:.4f}  dev AUC {epoch.dev_auc:.5f}  lr {epoch.lr:.2g}"
        )
        if self._open_writer is None:
            return
        run = f"{name.replace(':', '-')}-seed{self.seed}"
        if run not in self._writers:
            self._writers[run] = self._open_writer(run)
        for tag, value in vars(epoch).items():
            if tag not in ("epoch", "seconds"):
                self._writers[run].add_scalar(tag, value, epoch.epoch)


@dataclass(frozen=True)
class EmbeddedSet:
    """A manifest whose pairs are embedded. members: the same pairs with the vectors of each backbone."""

    job: Job
    members: tuple[LabelledPairs, ...]
    summary: EmbedSummary

    @property
    def pairs(self) -> LabelledPairs:
        """The pairs with the vectors of the first backbone."""
        return self.members[0]


def _check_algorithms(options: TrainOptions) -> None:
    """Raise `UsageError` for algorithms and features that are unknown or do not fit together."""
    if options.tune:
        from batchverify.training.tune import check_installed, search_space

        check_installed()
        search_space(options)
    else:
        estimator_specs(options)


def _tuned(
    training_pairs: LabelledPairs, dev: LabelledPairs, options: TrainOptions, log: TrainingLog
) -> tuple[TrainOptions, list[dict[str, Any]]]:
    """The options after the search of `--tune`, and its trials for the record."""
    if not options.tune:
        return options, []
    from batchverify.training.tune import tune

    log.write(f"--tune: at most {options.tune:,} trials on Ray")
    options, trials = tune(training_pairs, dev, options)
    log.write(f"--tune: the best of {len(trials):,} trials on dev: {json.dumps(trials[0])}")
    return options, trials


def _check(sets: Sequence[EmbeddedSet], options: TrainOptions, log: TrainingLog) -> list[Leak]:
    """Log what is left out and what leaks. Raises `UsageError` for unsuitable pairs and `--strict-identities`."""
    for each in sets:
        left_out = len(each.pairs.left_out)
        log_left_out(each.pairs.name, each.pairs.left_out, log)
        try:
            check_failed(left_out, left_out + len(each.pairs), options.max_failed, each.summary)
        except NothingScoredError as exc:
            raise NothingScoredError(f"{each.pairs.name} pairs: {exc}", exc.summary) from exc
        for pairs in each.members:
            pairs.check(FEWEST_PAIRS if each is sets[0] else 1)
    check_apart(sets[0].pairs, sets[1].pairs)
    leaks = find_leaks([each.pairs for each in sets])
    for leak in leaks:
        log.write(f"warning: {leak}")
    if options.strict_identities:
        _refuse(leaks)
        unnamed = [each.pairs.name for each in sets if not each.pairs.persons]
        if unnamed:
            log.write(
                f"warning: --strict-identities: the {' and '.join(unnamed)} pairs have no columns person_a and "
                "person_b that name people: only identical images were looked for"
            )
    return leaks


def _refuse(leaks: Sequence[Leak]) -> None:
    if leaks:
        raise UsageError("--strict-identities: " + "; ".join(map(str, leaks)))


def _record(
    sets: Sequence[EmbeddedSet],
    fits: Sequence[tuple[FittedHeads, Any]],
    options: TrainOptions,
    leaks: Sequence[Leak],
) -> dict[str, Any]:
    """The record of the training, for the file beside the head."""
    return {
        "head": dict(fits[0][0].head.about),
        "manifests": {each.pairs.name: each.job.manifest.names for each in sets},
        "image_roots": {each.pairs.name: each.job.manifest.roots for each in sets},
        "options": options.as_record(),
        "metrics": [metrics for _, metrics in fits],
        "networks": [
            {name: asdict(replace(network, scorers=())) for name, network in fitted.networks.items()}
            for fitted, _ in fits
        ],
        "leaks": [asdict(leak) for leak in leaks],
        "left_out": [{"set": each.pairs.name, **asdict(row)} for each in sets for row in each.pairs.left_out],
        "embedding": {each.pairs.name: each.summary.to_json() for each in sets},
    }


def head_target(output: str | Path) -> Location:
    """The head's location, checked before anything is embedded."""
    target = Location.parse(output)
    if target.suffix != SUFFIX:
        raise UsageError(f"--output {output}: the name of a head must end in {SUFFIX}")
    try:
        if target.is_local and not Path(target.parent.path).is_dir():
            raise UsageError(f"--output {output}: there is no folder {target.parent}")
        if target.is_local and not os.access(target.parent.path, os.W_OK):
            raise UsageError(f"--output {output}: the folder {target.parent} cannot be written to")
        if target.kind() == "folder":
            raise UsageError(f"--output {output}: this is a folder")
        if special := target.special():
            raise UsageError(f"--output {output}: {special}; a head is a file")
    except OSError as exc:
        raise UsageError(f"--output {output}: cannot be written: {exc}") from exc
    return target


def _embed_sets(train: Any, dev: Any, options: TrainOptions) -> list[EmbeddedSet]:
    """Open and check all manifests, then embed them."""
    jobs = open_sets(train, dev, options)
    if options.tune and jobs["training"].fused:
        raise UsageError("--tune searches the head of one backbone: search for each, then train all with --algorithm")
    first, second = jobs["training"], jobs["dev"]
    # `check_apart` later finds the same pairs under other names.
    if first.manifest_fingerprint == second.manifest_fingerprint and first.scan.images == second.scan.images:
        raise UsageError(
            f"the dev pairs are the training pairs ({jobs['dev'].manifest.names[0]}): dev must show how the head "
            "does on others"
        )
    if options.strict_identities:
        # People are known now, identical images only once they are embedded.
        _refuse(shared_people({name: people_of(job.manifest, job.scan) for name, job in jobs.items()}))
    return [embed_set(name, job) for name, job in jobs.items()]


def open_sets(train: Any, dev: Any, options: TrainOptions | FinetuneOptions) -> dict[str, Job]:
    """The manifests by the names of their sets, checked before anything is embedded."""
    manifests = {"training": train, "dev": dev}
    if options.test is not None:
        manifests["test"] = options.test
    jobs = {name: Job.open(manifest, options) for name, manifest in manifests.items()}
    for name, job in jobs.items():
        check_labels(name, job)
    return jobs


def check_labels(name: str, job: Job) -> None:
    """Raise `UsageError`, before anything is embedded, if a label is missing or there are too few pairs."""
    names = job.manifest.names
    same, different = count_labels(job.manifest, job.scan)
    source = f"{names[0]}{' …' if len(names) > 1 else ''}"
    if not (same and different):
        raise UsageError(
            f"{source}: the {name} pairs all have the label {int(different > 0)}; training needs 0 (same) and 1 "
            "(different)"
        )
    if name == "training" and same + different < FEWEST_PAIRS:
        raise UsageError(f"{source}: only {same + different} {name} pairs; at least {FEWEST_PAIRS} are needed")


def embed_set(name: str, job: Job) -> EmbeddedSet:
    """Embed with each backbone; pairs with an image that one of them could not embed are left out."""
    runs = [embed_job(replace(member, started=time.monotonic())) for member in job.members]
    summaries, tables = zip(*runs, strict=True)
    FusedTable(tables).keep_common()
    members = tuple(LabelledPairs.collect(job.manifest, job.scan, table, name) for table in tables)
    return EmbeddedSet(job, members, fused_summary(job, summaries) if job.fused else summaries[0])


def _with_views(training: EmbeddedSet, options: TrainOptions) -> tuple[list[LabelledPairs], list[EmbedSummary]]:
    """The training pairs with `options.augment` augmented views, and the summaries of embedding these.

    For each backbone the same pairs.
    """
    members, summaries = [], []
    for job, pairs in zip(training.job.members, training.members, strict=True):
        runs = [embed_job(job.of_view(view)) for view in range(1, options.augment + 1)]
        views = [embeddings.vectors for _, embeddings in runs]
        members.append(pairs.with_views(views, options.seed) if views else pairs)
        summaries += [summary for summary, _ in runs]
    return members, summaries


def _fit_repeats(
    sets: Sequence[EmbeddedSet],
    training_pairs: Sequence[LabelledPairs],
    options: TrainOptions,
    log: TrainingLog,
) -> list[tuple[FittedHeads, dict[str, Any]]]:
    """One fit per seed, with its metrics on all sets."""
    job, dev = sets[0].job, sets[1].members
    embeddings = dict(zip(job.names or [""], (member.fingerprint for member in job.members), strict=True))
    left_out = len(training_pairs[0].left_out)
    about = {"training": {"manifest_fingerprint": job.manifest_fingerprint, "left_out": left_out}}
    fits = []
    for seed in range(options.seed, options.seed + options.repeats):
        log.seed = seed
        if options.repeats > 1:
            log.write(f"seed {seed}:")
        seeded = replace(options, seed=seed)
        fitted = fit_heads(training_pairs, dev, embeddings, seeded, about, log.epoch)
        metrics = {"seed": seed, **{name: fitted.head.about[name] for name in ("held_out", "dev")}}
        metrics |= {each.pairs.name: asdict(measure_heads(fitted.head, each.members)) for each in sets[2:]}
        fits.append((fitted, metrics))
    return fits


def log_left_out(name: str, left_out: Sequence[LeftOut], log: TrainingLog) -> None:
    """Log the first pairs that could not be embedded. name: of their set."""
    count = len(left_out)
    if count:
        verb = "pair could not be embedded and is" if count == 1 else "pairs could not be embedded and are"
        log.write(f"warning: {count:,} {name} {verb} left out:")
    for row in left_out[:SHOWN]:
        log.write(f"  {row}")
    if count > SHOWN:
        log.write(f"  … and {count - SHOWN:,} more; the training record lists them all")


def _tensorboard(folder: str) -> Callable[[str], Any]:
    """A function that opens TensorBoard's writer for a run. A local folder is made now, to report errors at once."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise UsageError("--tensorboard needs TensorBoard: pip install tensorboard") from exc
    if "://" not in folder:
        folder = expand_home(folder)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--tensorboard {folder}: the folder cannot be made: {exc.strerror}") from exc
    return lambda run: SummaryWriter(f"{folder}/{run}")
