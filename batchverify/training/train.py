"""`train`: from labelled manifests to a stored head, its log and its summary."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from batchverify.errors import NothingScoredError, UsageError
from batchverify.options import TrainOptions
from batchverify.progress import duration
from batchverify.scoring.job import Job
from batchverify.scoring.score import check_failed, embed_job
from batchverify.scoring.summary import EmbedSummary
from batchverify.storage.location import Location
from batchverify.training.fit import FEWEST_PAIRS, Fitted, estimator_specs, fit_head, measure_head
from batchverify.training.network import Epoch
from batchverify.training.pairs import (
    LabelledPairs,
    Leak,
    check_apart,
    count_labels,
    find_leaks,
    people_of,
    shared_people,
)

SUFFIX = ".safetensors"
SHOWN = 5


@dataclass(frozen=True)
class _Set:
    """A manifest with its embedded, labelled pairs."""

    job: Job
    pairs: LabelledPairs
    summary: EmbedSummary


def train(
    train: Any, dev: Any, output: str | Path, options: TrainOptions | None = None, **changes: Any
) -> TrainSummary:
    """Fit a head to the labelled pairs of a manifest and write it with the record of its training.

    train, dev: manifests as `score` takes them, with a label in every row. output: the head's path or URI,
    ending in `.safetensors`; the record goes beside it, ending in `.training.json`. Options come as a
    `TrainOptions`, as keyword arguments of its fields, or both. With `options.test` a third manifest is
    measured, and takes no part.

    Raises `ManifestError` and `UsageError` for bad input, `TrainingError` where a network cannot learn.
    """
    started = time.monotonic()
    options = replace(options or TrainOptions(), **changes)
    _check_recipes(options)
    target = _target(output)
    with TrainingLog(options.epochs, quiet=options.quiet, tensorboard=options.tensorboard) as log:
        sets = _embed_sets(train, dev, options)
        leaks = _check(sets, options, log)
        learned, view_runs = _with_views(sets[0], options)
        options, trials = _tuned(learned, sets[1].pairs, options, log)
        fits = _fit_repeats(sets, learned, options, log)
    head = fits[0][0].head
    record = _record(sets, fits, options, leaks)
    record["views"] = [each.to_json() for each in view_runs]
    record["tune"] = trials
    record["seconds"] = round(time.monotonic() - started, 2)
    target.write_bytes(head.to_bytes())
    record_path = target.parent.join(f"{PurePosixPath(target.path).stem}.training.json")
    record_path.write_bytes(json.dumps(record, indent=1).encode())
    return TrainSummary(
        recipes=[f"{each.algorithm}:{each.features}" for each in head.scorers],
        parameters=head.parameters,
        pairs={each.pairs.name: len(each.pairs) for each in sets},
        left_out=len(record["left_out"]),
        embedded=sum(each.embedded for each in (*view_runs, *(each.summary for each in sets))),
        leaks=len(leaks),
        about=head.about,
        metrics=record["metrics"],
        range_tests={name: fit.max_lr for name, fit in fits[0][0].networks.items()},
        seconds=record["seconds"],
        head=str(target),
        digest=head.digest,
        record=str(record_path),
    )


def _check_recipes(options: TrainOptions) -> None:
    """Raise `UsageError` for algorithms and features that are none or go together ill."""
    if options.tune:
        from batchverify.training.tune import check_installed, search_space

        check_installed()
        search_space(options)
    else:
        estimator_specs(options)


def _tuned(
    learned: LabelledPairs, dev: LabelledPairs, options: TrainOptions, log: TrainingLog
) -> tuple[TrainOptions, list[dict[str, Any]]]:
    """The options after the search that they ask for, and its trials for the record."""
    if not options.tune:
        return options, []
    from batchverify.training.tune import tune

    log.say(f"--tune: at most {options.tune:,} trials on Ray")
    options, found = tune(learned, dev, options)
    trials = [each.to_json() for each in found]
    log.say(f"--tune: the best of {len(trials):,} on dev: {json.dumps(trials[0])}")
    return options, trials


def _check(sets: Sequence[_Set], options: TrainOptions, log: TrainingLog) -> list[Leak]:
    """Say what is left out and what leaks; `UsageError` for pairs that teach nothing and for strict identities."""
    for each in sets:
        lost = len(each.pairs.left_out)
        _say_left_out(each.pairs, log)
        try:
            check_failed(lost, lost + len(each.pairs), options.max_failed, each.summary)
        except NothingScoredError as exc:
            raise NothingScoredError(f"{each.pairs.name} pairs: {exc}", exc.summary) from exc
        each.pairs.check(FEWEST_PAIRS if each is sets[0] else 1)
    check_apart(sets[0].pairs, sets[1].pairs)
    leaks = find_leaks([each.pairs for each in sets])
    for leak in leaks:
        log.say(f"warning: {leak}")
    if options.strict_identities:
        _refuse(leaks)
    nameless = [each.pairs.name for each in sets if not each.pairs.persons]
    if nameless and options.strict_identities:
        log.say(
            f"warning: --strict-identities: the {' and '.join(nameless)} pairs have no columns person_a and "
            "person_b that name people: only identical images were looked for"
        )
    return leaks


def _refuse(leaks: Sequence[Leak]) -> None:
    if leaks:
        raise UsageError("--strict-identities: " + "; ".join(map(str, leaks)))


def _record(
    sets: Sequence[_Set], fits: Sequence[tuple[Fitted, Any]], options: TrainOptions, leaks: Sequence[Leak]
) -> dict[str, Any]:
    """Everything that training found, for the file beside the head."""
    return {
        "head": dict(fits[0][0].head.about),
        "options": options.as_record(),
        "metrics": [each for _, each in fits],
        "networks": [
            {name: asdict(replace(fit, scorers=())) for name, fit in each.networks.items()}
            for each, _ in fits
        ],
        "leaks": [leak.to_json() for leak in leaks],
        "left_out": [{"set": each.pairs.name, **asdict(row)} for each in sets for row in each.pairs.left_out],
        "embedding": {each.pairs.name: each.summary.to_json() for each in sets},
    }


def _target(output: str | Path) -> Location:
    """Where the head goes, looked at before anything is embedded."""
    target = Location.parse(os.fspath(output))
    if target.suffix != SUFFIX:
        raise UsageError(f"--output {output}: a head's name ends in {SUFFIX}")
    if target.is_local and not Path(target.parent.path).is_dir():
        raise UsageError(f"--output {output}: there is no folder {target.parent}")
    if target.is_local and not os.access(target.parent.path, os.W_OK):
        raise UsageError(f"--output {output}: the folder {target.parent} cannot be written")
    if target.kind() == "folder":
        raise UsageError(f"--output {output}: a folder has this name")
    return target


def _embed_sets(train: Any, dev: Any, options: TrainOptions) -> list[_Set]:
    """Every manifest opened and checked first, then embedded."""
    manifests = {"training": train, "dev": dev}
    if options.test is not None:
        manifests["test"] = options.test
    jobs = {name: Job.open(manifest, options) for name, manifest in manifests.items()}
    for name, job in jobs.items():
        _check_labels(name, job)
    if _same_pairs(jobs["training"], jobs["dev"]):
        raise UsageError(
            f"the dev pairs are the training pairs ({jobs['dev'].manifest.names[0]}): nothing would show what "
            "the head is worth on others"
        )
    if options.strict_identities:
        # Names are known now; identical images only once they are embedded.
        _refuse(shared_people({name: people_of(job.manifest, job.scan) for name, job in jobs.items()}))
    return [_embed_set(name, job) for name, job in jobs.items()]


def _check_labels(name: str, job: Job) -> None:
    """Before anything is embedded: `UsageError` for labels that teach nothing, however well the images are read."""
    manifest = job.manifest
    same, different = count_labels(manifest, job.scan)
    place = f"{manifest.names[0]}{' …' if len(manifest.names) > 1 else ''}: the {name} pairs"
    if not (same and different):
        only = int(different > 0)
        raise UsageError(f"{place} all have the label {only}; training needs 0 (same) and 1 (different)")
    if name == "training" and same + different < FEWEST_PAIRS:
        raise UsageError(f"{place} are {same + different}: fewer than {FEWEST_PAIRS} teach nothing")


def _same_pairs(train: Job, dev: Job) -> bool:
    """Whether both manifests are one; what `check_apart` finds later are the same pairs under other names."""
    return train.manifest_fingerprint == dev.manifest_fingerprint and train.scan.images == dev.scan.images


def _embed_set(name: str, job: Job) -> _Set:
    summary, embeddings = embed_job(replace(job, started=time.monotonic()))
    return _Set(job, LabelledPairs.collect(job.manifest, job.scan, embeddings, name), summary)


def _with_views(trained: _Set, options: TrainOptions) -> tuple[LabelledPairs, list[EmbedSummary]]:
    """The training pairs with those of `options.augment` changed views, and how these were embedded."""
    runs = [embed_job(trained.job.of_view(view)) for view in range(1, options.augment + 1)]
    views = [embeddings.vectors for _, embeddings in runs]
    pairs = trained.pairs.with_views(views, options.seed) if views else trained.pairs
    return pairs, [summary for summary, _ in runs]


def _fit_repeats(
    sets: Sequence[_Set], learned: LabelledPairs, options: TrainOptions, log: TrainingLog
) -> list[tuple[Fitted, dict[str, Any]]]:
    """One fit a seed, each with its metrics: the fit has measured dev, test is measured here."""
    job = sets[0].job
    about = {
        "training": {"manifest_fingerprint": job.manifest_fingerprint, "left_out": len(learned.left_out)}
    }
    fits = []
    for seed in range(options.seed, options.seed + options.repeats):
        log.seed = seed
        if options.repeats > 1:
            log.say(f"seed {seed}:")
        fitted = fit_head(
            learned, sets[1].pairs, job.fingerprint, replace(options, seed=seed), about, log.epoch
        )
        metrics = {"seed": seed, **{name: fitted.head.about[name] for name in ("held_out", "dev")}}
        metrics |= {each.pairs.name: asdict(measure_head(fitted.head, each.pairs)) for each in sets[2:]}
        fits.append((fitted, metrics))
    return fits


def _say_left_out(pairs: LabelledPairs, log: TrainingLog) -> None:
    count = len(pairs.left_out)
    if count:
        what = "pair could not be embedded and is" if count == 1 else "pairs could not be embedded and are"
        log.say(f"warning: {count:,} {pairs.name} {what} left out:")
    for row in pairs.left_out[:SHOWN]:
        log.say(f"  {row}")
    if count > SHOWN:
        log.say(f"  … and {count - SHOWN:,} more; the training record lists them")


@dataclass(frozen=True)
class TrainSummary:
    """A training's outcome.

    recipes: of the head's scorers. pairs: by set. about: the head's metadata. metrics: one mapping a seed,
    of `metrics.Metrics` by set (`held_out`, `dev`, `test`). range_tests: rate by network.
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
        left = f"; {self.left_out:,} left out" if self.left_out else ""
        lines = [
            ("pairs", f"{counts}{left}"),
            ("images embedded", f"{self.embedded:,}"),
            ("head", f"{' + '.join(self.recipes)}, {self.parameters:,} numbers"),
        ]
        lines += [(f"rate of {name}", f"{rate:.2g}") for name, rate in self.range_tests.items()]
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
            ("time", duration(self.seconds)),
            ("written to", f"{self.head}, {self.record}"),
        ]
        return lines

    def _metrics(self, name: str) -> str:
        """AUC, F1 and the rest of one set, with the spread over seeds where there are several."""

        def mean(field: str, digits: int) -> str:
            values = [each[name][field] for each in self.metrics]
            spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
            return f"{np.mean(values):.{digits}f}{spread}"

        return (
            f"AUC {mean('auc', 5)}, F1 {mean('f1', 4)} (best possible {mean('best_f1', 4)}), "
            f"accuracy {mean('accuracy', 4)}, Brier {mean('brier', 4)}, ECE {mean('ece', 4)}"
        )

    @staticmethod
    def _rates(thresholds: Mapping[str, Any]) -> str:
        rates = ", ".join(f"{each['far']:g} at {each['threshold']:.4f}" for each in thresholds["far"])
        pairs = f"{thresholds['different_pairs']:,} different pairs"
        return f"{rates} (of {pairs})" if rates else f"no rate: {pairs} support none"


class TrainingLog:
    """Takes epochs as they end; a context that writes out what it holds. tensorboard: its folder, or None.

    Raises `UsageError` where TensorBoard is asked for and not installed, or its folder cannot be made.
    """

    def __init__(self, epochs: int, *, quiet: bool = False, tensorboard: str | None = None) -> None:
        self._epochs = epochs
        self._quiet = quiet
        self._writers: dict[str, Any] = {}
        self._open_writer = _tensorboard(tensorboard) if tensorboard is not None else None
        self.seed = 0

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._open_writer is not None and not self._writers and kind is None:
            self.say("warning: --tensorboard: nothing was written, for only networks have epochs to log")

    def say(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if not self._quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def epoch(self, name: str, epoch: Epoch) -> None:
        """Show and keep one epoch of the network called `name`."""
        self.say(
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


def _tensorboard(folder: str) -> Callable[[str], Any]:
    """What opens TensorBoard's writer for a run; the folder for its files is made: local ones are tried at once."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise UsageError("--tensorboard needs TensorBoard: pip install tensorboard") from exc
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--tensorboard {folder}: the folder cannot be made: {exc.strerror}") from exc
    return lambda run: SummaryWriter(f"{folder}/{run}")
