"""`calibrate`: a head's calibration, thresholds and bounds fitted to the user's own labelled pairs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from batchverify.documents import MOST_RECORD, read_document
from batchverify.errors import BatchverifyError, UsageError, first_line
from batchverify.evaluation.scores import UNKNOWN, ScoreFile, read_scores, read_units
from batchverify.fingerprint import FUSION
from batchverify.heads.fused_head import FusedHead
from batchverify.heads.head import Head
from batchverify.manifest.manifest import Columns, Manifest
from batchverify.manifest.tables import TableFile
from batchverify.options import CalibrateOptions
from batchverify.progress import duration
from batchverify.scoring.job import Job, head_of
from batchverify.scoring.parquet import writing
from batchverify.scoring.score import check_failed
from batchverify.storage.location import Location
from batchverify.training.fit import FEWEST_PAIRS, probabilities
from batchverify.training.fuse import head_probabilities, logits_of
from batchverify.training.guarantees import ScorePairs
from batchverify.training.pairs import SHOWN, LabelledPairs, people_of
from batchverify.training.recalibration import ScoredPairs, recalibrate
from batchverify.training.train import TrainingLog, check_labels, embed_set, head_target, log_left_out
from batchverify.version import __version__

# In place of a head's file: the one that is shipped for the settings.
SHIPPED = "shipped"
NAME = "labelled"
# A manifest whose people and images the pairs must not share, after its part in the training, or its name.
Other = tuple[str, Manifest]


def calibrate(
    head: str | Path,
    labelled: Any,
    output: str | Path,
    options: CalibrateOptions | None = None,
    **changes: Any,
) -> CalibrateSummary:
    """Fit calibration, thresholds and bounds of a head to labelled pairs, and write the new head.

    head: its file, or `shipped`. labelled: a manifest as for `train`, or an output of `score` by this head with true
    labels. The scorers, the centre and the backbones stay as they are. Options are a `CalibrateOptions`, keyword
    arguments of its fields, or both.

    Raises `ManifestError` and `UsageError` for bad input, also for pairs that the head has learned from.
    """
    started = time.monotonic()
    options = replace(options or CalibrateOptions(), **changes)
    target = head_target(output)
    path = None if str(head) == SHIPPED else str(head)
    with TrainingLog(0, quiet=options.quiet) as log:
        source = (
            _read_output(labelled, path, options) if _is_output(labelled) else _embed(labelled, path, options, log)
        )
    done = recalibrate(source.head, source.scored, options.calibration)
    record = {
        "version": __version__,
        "head": source.head.digest,
        "pairs": len(source.scored.pairs),
        "left_out": source.left_out,
        "fingerprint": source.fingerprint,
        "method": options.calibration,
    }
    new = replace(done.head, about={**done.head.about, "version": __version__, "recalibration": record})
    with writing(target):
        target.write_bytes(new.to_bytes())
    return CalibrateSummary(
        pairs=len(source.scored.pairs),
        left_out=source.left_out,
        apart_from=source.apart_from,
        before=asdict(done.before),
        after=asdict(done.after) if done.after is not None else None,
        old_thresholds=source.head.about["thresholds"],
        old_rates=done.rates,
        about=new.about,
        seconds=round(time.monotonic() - started, 2),
        head=str(target),
        digest=new.digest,
    )


@dataclass(frozen=True)
class CalibrateSummary:
    """What `calibrate` did.

    before, after: fields of `figures.Metrics` on the labelled pairs, of the head as it was and, cross-validated over
    people, of the new one; None with too few people. old_rates: what the old thresholds let through of the different
    pairs. apart_from: what was compared with the pairs to see that they are new to the head.
    """

    pairs: int
    left_out: int
    apart_from: Sequence[str]
    before: Mapping[str, Any]
    after: Mapping[str, Any] | None
    old_thresholds: Mapping[str, Any]
    old_rates: Sequence[Mapping[str, float]]
    about: Mapping[str, Any]
    seconds: float
    head: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        names = ("calibration", "thresholds", "recalibration")
        old = {name: self.old_thresholds[name] for name in ("best_f1", "far")}
        return {
            **vars(self),
            "old_thresholds": old,
            "about": {name: self.about[name] for name in names},
        }

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        thresholds, bounds = self.about["thresholds"], self.about["thresholds"]["bounds"]
        left_out = f"; {self.left_out:,} left out" if self.left_out else ""
        return [
            ("pairs", f"{self.pairs:,}{left_out}"),
            ("new to the head", "; ".join(self.apart_from) or "not known: name its pairs with --apart-from"),
            ("as it was", _shown(self.before)),
            ("calibrated", f"{_shown(self.after)}; cross-validated" if self.after else TOO_FEW),
            *(
                ("old threshold", f"{each['threshold']:.4f} for FAR {each['far']:g}: here {each['has']:.2g}")
                for each in self.old_rates
            ),
            ("threshold", f"{thresholds['best_f1']:.4f} (best expected F1)"),
            *(
                (
                    f"FAR {each['far']:g}",
                    f"{each['threshold']:.4f}; at most {each['bounds']['0.95']:.2g} with 95 %",
                )
                for each in thresholds["far"]
            ),
            (
                "bounds from",
                f"{bounds['different']['pairs']:,} different and {bounds['same']['pairs']:,} same pairs that share "
                f"no {bounds['unit']}",
            ),
            ("time", duration(self.seconds)),
            ("written to", self.head),
        ]


TOO_FEW = "too few people to cross-validate"


def _shown(metrics: Mapping[str, Any]) -> str:
    return (
        f"ECE {metrics['ece']:.4f}, Brier {metrics['brier']:.4f}, F1 {metrics['f1']:.4f} at "
        f"{metrics['threshold']:.4f}, AUC {metrics['auc']:.5f}"
    )


@dataclass(frozen=True)
class _Source:
    """The labelled pairs with the head that scored them."""

    head: Head | FusedHead
    scored: ScoredPairs
    fingerprint: str
    left_out: int
    apart_from: tuple[str, ...]


def _embed(labelled: Any, path: str | None, options: CalibrateOptions, log: TrainingLog) -> _Source:
    """Score the pairs of a manifest."""
    job = Job.open(labelled, options)
    check_labels(NAME, job)
    head = head_of(path, [member.fingerprint for member in job.members])
    apart_from = _check_new(head, job, _known_manifests(path, head, log) + _named(options))
    each = embed_set(NAME, job)
    pairs = each.pairs
    log_left_out(pairs.name, pairs.left_out, log)
    failed = len(pairs.left_out)
    check_failed(failed, failed + len(pairs), options.max_failed, each.summary)
    for member in each.members:
        member.check(FEWEST_PAIRS)

    def score(new: Head | FusedHead) -> ScorePairs:
        return lambda a, b: head_probabilities(new, [replace(member, a=a, b=b) for member in each.members])

    scored = ScoredPairs(pairs, _logits(head, each.members), score)
    return _Source(head, scored, job.manifest_fingerprint, failed, apart_from)


def _logits(head: Head | FusedHead, members: Sequence[LabelledPairs]) -> tuple[np.ndarray, ...]:
    """(N,) float64 calibrated logits by each backbone's head."""
    heads = head.members if isinstance(head, FusedHead) else (head,)
    return tuple(
        probabilities(replace(one, as_logits=True), pairs).astype(np.float64)
        for one, pairs in zip(heads, members, strict=True)
    )


def _named(options: CalibrateOptions) -> list[Other]:
    """The manifests of `--apart-from`."""
    columns = Columns(options.column_a, options.column_b)
    root, links = options.image_root, options.follow_symlinks
    return [
        (name, Manifest.open(name, columns=columns, image_root=root, follow_symlinks=links))
        for name in options.apart_from
    ]


def _known_manifests(path: str | None, head: Head | FusedHead, log: TrainingLog) -> list[Other]:
    """The training manifest that the record beside the head names, if it is there and unchanged."""
    if path is None:
        return []
    target = Location.parse(path)
    record_path = target.parent.join(f"{PurePosixPath(target.path).stem}.training.json")
    try:
        record = read_document(record_path.read_bytes(MOST_RECORD), MOST_RECORD)
        return _recorded_manifests(record, head, log)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BatchverifyError) as exc:
        log.write(f"warning: {record_path}: the training pairs are not compared: {first_line(exc)}")
        return []


def _recorded_manifests(record: Mapping[str, Any], head: Head | FusedHead, log: TrainingLog) -> list[Other]:
    """The training manifest of a record that is the head's. Raises what a made-up record leads to."""
    training = head.about["training"]["manifest_fingerprint"]
    if record["head"]["training"]["manifest_fingerprint"] != training:
        return []
    options = record["options"]
    columns = Columns(options.get("column_a", "image_a"), options.get("column_b", "image_b"))
    names = record["manifests"]["training"]
    # The option may be relative to the folder that the training ran in.
    root = record["image_roots"]["training"] if options.get("image_root") is not None else None
    files = [TableFile(Location.parse(name)) for name in names]
    opened = Manifest(files, columns=columns, image_root=root)
    if opened.fingerprint != training:
        more = f" and {len(names) - 1:,} more file{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
        verb = "have" if more else "has"
        log.write(f"warning: {names[0]}{more} {verb} changed since the head was trained: not compared")
        return []
    return [("the head's training pairs", opened)]


def _check_new(head: Head | FusedHead, job: Job, others: Sequence[Other]) -> tuple[str, ...]:
    """What the pairs were compared with. Raises `UsageError` if the head has learned from them."""
    source = job.manifest.names[0]
    if job.manifest_fingerprint == head.about.get("training", {}).get("manifest_fingerprint"):
        raise UsageError(f"{source}: these are the head's training pairs; calibrate on pairs of other people")
    people, images = people_of(job.manifest, job.scan), {str(path) for path in job.scan.images}
    compared = []
    for other, manifest in others:
        scan = manifest.scanned
        known = people_of(manifest, scan)
        for what, shared in (
            ("people", people & known),
            ("images", images & {str(path) for path in scan.images}),
        ):
            if shared:
                some = ", ".join(sorted(shared)[:SHOWN])
                raise UsageError(
                    f"{source}: shares {len(shared):,} {what} with {other} ({some}); calibrate on pairs of others"
                )
        compared.append(f"shares none of {len(known):,} people and {len(scan.images):,} images of {other}")
    return tuple(compared)


def _is_output(labelled: Any) -> bool:
    """Whether this is an output of `score` rather than a manifest."""
    if not isinstance(labelled, str | Path):
        return False
    with suppress(BatchverifyError):
        return "head" in ScoreFile.open(str(labelled)).record
    return False


def _read_output(labelled: str | Path, path: str | None, options: CalibrateOptions) -> _Source:
    """The scores of an output of `score` whose labels are known, by a head of one backbone."""
    file = ScoreFile.open(str(labelled))
    for option, given in (("--apart-from", bool(options.apart_from)), ("--limit", options.limit is not None)):
        if given:
            raise UsageError(f"{labelled}: {option} is for a manifest, not for an output of `score`")
    if (file.record.get("options") or {}).get("prior") is not None:
        raise UsageError(f"{labelled}: its probabilities were shifted by --prior; score the pairs without it")
    if path is None:
        raise UsageError(f"{labelled}: an output of `score` needs the file of its head, not `{SHIPPED}`")
    if FUSION in (file.record.get("embedding") or {}):
        raise UsageError(f"{labelled}: a head of several backbones needs the manifest, not an output of `score`")
    head = Head.load(path)
    if head.digest != file.record["head"]:
        raise UsageError(f"{labelled}: was not scored by {path}; give the manifest, or score it again")
    scores, units = read_scores(file), read_units(file)
    rows = np.flatnonzero((scores.truth != UNKNOWN) & scores.scored)
    a, b = units.a[rows].astype(np.int32), units.b[rows].astype(np.int32)
    # Each unit, a person or an image, stands for an image, which is all that folds and bounds ask for.
    persons = {unit: str(unit) for unit in range(units.count)} if units.kind == "identities" else {}
    vectors = np.ones((units.count, 1), np.float16)
    pairs = LabelledPairs(vectors, a, b, scores.truth[rows], NAME, persons=persons)
    pairs.check(FEWEST_PAIRS)
    scored = ScoredPairs(pairs, (logits_of(scores.probability[rows].astype(np.float64)),))
    fingerprint = str(file.record.get("manifest_fingerprint", ""))
    if fingerprint and fingerprint == head.about.get("training", {}).get("manifest_fingerprint"):
        raise UsageError(f"{labelled}: these are the head's training pairs; calibrate on pairs of other people")
    return _Source(head, scored, fingerprint, len(scores) - len(rows), ())
