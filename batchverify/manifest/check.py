"""`check`: examine a manifest before it is scored: files, rows, repeated and contradicting pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from batchverify.errors import UsageError
from batchverify.manifest.columns import LABEL, TRUE_LABEL
from batchverify.manifest.manifest import Manifest, Scan
from batchverify.progress import duration
from batchverify.records import Limits, Reason, Skipped
from batchverify.storage.fence import Fence
from batchverify.storage.location import Location

# About the rate of two CPU cores; a GPU embeds a hundred times as many.
IMAGES_PER_SECOND = 50.0
EXAMPLES = 10
# Files in one call to a file system: an object store answers for them in parallel.
_LOOK_UP = 1024
_THREADS = 8
BLANK = -1
_Choice = Callable[[np.ndarray], tuple[int, int]]


@dataclass(frozen=True)
class Finding:
    """How often an issue occurs, and the places of the first cases."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What `check_manifest` found.

    types: by column. labels: number of rows with 0, 1 and blank; None without a label column. refused: rows with
    an empty or forbidden cell. looked_up: number of images whose files were looked up. missing: images among these
    without a readable file. duplicates, mirrored, selves, contradicting: as in `PairIssues`. seconds: estimated
    time to embed.
    """

    files: tuple[str, ...]
    rows: int
    types: Mapping[str, str]
    labels: Mapping[str, int] | None
    unique_images: int
    refused: Finding
    looked_up: int
    missing: Finding
    missing_reasons: Mapping[str, int]
    duplicates: Finding
    mirrored: Finding
    selves: Finding
    contradicting: Finding
    seconds: float
    images_per_second: float

    @property
    def ok(self) -> bool:
        """Whether nothing is refused, missing or contradicting; other findings may be intended."""
        return not (self.missing.count or self.refused.count or self.contradicting.count)

    @property
    def unique_share(self) -> float:
        """Unique images as a share of all image paths."""
        return self.unique_images / (2 * self.rows)

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {"ok": self.ok, **asdict(self), "unique_share": round(self.unique_share, 6)}

    def lines(self) -> list[str]:
        """The report for people."""
        named = [
            ("files", self._files()),
            ("rows", f"{self.rows:,}"),
            ("columns", ", ".join(f"{name} ({kind})" for name, kind in self.types.items())),
            ("labels", self._labels()),
            ("unique images", f"{self.unique_images:,} for {2 * self.rows:,} image paths ({self.unique_share:.1%})"),
            ("time to embed", f"about {duration(self.seconds)}, an estimate at {self.images_per_second:g} images/s"),
        ]
        findings = [
            ("refused rows", self.refused, "an empty cell or a path that is not read"),
            ("missing images", self.missing, self._looked_up()),
            ("contradicting pairs", self.contradicting, "labels 0 and 1 for one pair"),
            ("duplicate rows", self.duplicates, "the pair appears earlier"),
            ("mirrored pairs", self.mirrored, "(a, b) and (b, a)"),
            ("self pairs", self.selves, "one image on both sides"),
        ]
        lines = [f"{name:<20} {value}" for name, value in named]
        for name, finding, meaning in findings:
            lines.append(f"{name:<20} {finding.count:,}  ({meaning})")
            lines.extend(f"    {example}" for example in finding.examples)
        return [*lines, "no faults found" if self.ok else "the manifest has faults"]

    def _files(self) -> str:
        more = f" and {len(self.files) - 3:,} more" if len(self.files) > 3 else ""
        return ", ".join(self.files[:3]) + more

    def _labels(self) -> str:
        if self.labels is None:
            return "no column 'label'"
        counts = self.labels
        return f"{counts['0']:,} same (0), {counts['1']:,} different (1), {counts['blank']:,} blank"

    def _looked_up(self) -> str:
        reasons = "".join(f", {count:,} {reason}" for reason, count in self.missing_reasons.items())
        return f"{self.looked_up:,} of {self.unique_images:,} images looked up{reasons}"


def check_manifest(
    manifest: Manifest,
    *,
    every: bool = False,
    sample: int = 1000,
    seed: int = 0,
    limits: Limits | None = None,
    images_per_second: float = IMAGES_PER_SECOND,
) -> CheckReport:
    """Read a manifest and report what is wrong with it. No image is opened.

    every: look up all image files, not only a seeded sample. Raises `ManifestError` for a manifest that cannot be
    read.
    """
    scan = manifest.scan()
    pairs = _Pairs.read(manifest, scan)
    refused = np.array([isinstance(image, Skipped) for image in scan.images])
    images = np.flatnonzero(~refused)
    unique = len(images)
    if not every and unique > sample:
        images = np.sort(np.random.default_rng(seed).choice(images, sample, replace=False))
    paths = [str(scan.images[int(index)]) for index in images]
    failures = look_up(paths, limits or Limits(), manifest.fence)
    missing = {int(images[position]): skipped for position, skipped in failures.items()}
    usable = np.flatnonzero(~(refused[pairs.a] | refused[pairs.b]))
    labels = pairs.labels[usable] if pairs.labels is not None else None
    issues = find_pair_issues(pairs.a[usable], pairs.b[usable], labels, most=EXAMPLES)
    return CheckReport(
        files=tuple(manifest.names),
        rows=scan.rows,
        types={LABEL if field.name == TRUE_LABEL else field.name: str(field.type) for field in scan.carried},
        labels=_label_counts(pairs.labels),
        unique_images=unique,
        refused=pairs.refused(refused),
        looked_up=len(images),
        missing=pairs.missing(missing),
        missing_reasons=dict(Counter(skipped.reason.value for skipped in missing.values())),
        duplicates=pairs.of_pairs(issues.duplicates, usable, "repeats row"),
        mirrored=pairs.of_pairs(issues.mirrored, usable, "mirrors row"),
        selves=pairs.of_pairs(issues.selves, usable, "one image on both sides"),
        contradicting=pairs.of_pairs(issues.contradicting, usable, "contradicts row"),
        seconds=unique / images_per_second,
        images_per_second=images_per_second,
    )


def _label_counts(labels: np.ndarray | None) -> dict[str, int] | None:
    if labels is None:
        return None
    return {name: int((labels == value).sum()) for name, value in (("0", 0), ("1", 1), ("blank", BLANK))}


@dataclass(frozen=True)
class _Pairs:
    """All N pairs of a manifest; describes findings among them in words: file, row of that file, column.

    a, b: (N,) indices of images. labels: (N,) int8, 0, 1 or `BLANK`; None without labels.
    """

    manifest: Manifest
    scan: Scan
    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray | None

    @classmethod
    def read(cls, manifest: Manifest, scan: Scan) -> _Pairs:
        """Those of a scanned manifest."""
        kind = np.int32 if len(scan.images) < 2**31 else np.int64
        a, b = np.empty(scan.rows, kind), np.empty(scan.rows, kind)
        labels = np.empty(scan.rows, np.int8) if manifest.has_label else None
        for block in manifest.blocks(scan):
            rows = slice(block.first, block.first + len(block.a))
            a[rows], b[rows] = block.a, block.b
            if labels is not None:
                cells = block.carried.column(TRUE_LABEL)
                labels[rows] = cells.fill_null(BLANK).to_numpy(zero_copy_only=False)
        return cls(manifest, scan, a, b, labels)

    def refused(self, refused: np.ndarray) -> Finding:
        """Rows with a refused image. refused: by image."""
        rows = np.flatnonzero(refused[self.a] | refused[self.b])
        examples = []
        for row in rows[:EXAMPLES]:
            on_a = refused[self.a[row]]
            skipped = self.scan.images[int((self.a if on_a else self.b)[row])]
            examples.append(self._cell(row, on_a, skipped))
        return Finding(len(rows), tuple(examples))

    def missing(self, missing: Mapping[int, Skipped]) -> Finding:
        """Images without a readable file, each with the first row that names it."""
        examples = []
        for index, skipped in list(missing.items())[:EXAMPLES]:
            row = np.argmax((self.a == index) | (self.b == index))
            examples.append(self._cell(row, self.a[row] == index, skipped))
        return Finding(len(missing), tuple(examples))

    def of_pairs(self, issue: PairIssue, rows: np.ndarray, verb: str) -> Finding:
        """Pairs with an issue. rows: the manifest's rows that were examined."""
        examples = []
        for row, earlier in issue.rows:
            file, number = self.manifest.locate(self.scan, int(rows[row]))
            text = f"{file}: row {number}: {verb}"
            if row != earlier:
                earlier_file, earlier_number = self.manifest.locate(self.scan, int(rows[earlier]))
                text += f" {earlier_number}" if earlier_file == file else f" {earlier_number} of {earlier_file}"
            examples.append(text)
        return Finding(issue.count, tuple(examples))

    def _cell(self, row: np.integer, on_a: bool, skipped: str | Skipped) -> str:
        file, number = self.manifest.locate(self.scan, int(row))
        column = self.manifest.columns.a if on_a else self.manifest.columns.b
        message = skipped.message if isinstance(skipped, Skipped) else skipped
        return f"{file}: row {number}: column '{column}': {message}"


def look_up(image_paths: Sequence[str], limits: Limits, fence: str | None = None) -> dict[int, Skipped]:
    """The images without a readable file, by position: absent, outside of a fence, not a regular file, or too large.

    image_paths: absolute paths and URIs. fence: the folder that local images must lie in. Only file systems are
    asked; no file is opened.
    """
    guard = Fence(fence) if fence is not None else None
    stores: dict[tuple[str, str, str], list[tuple[int, Location]]] = {}
    for position, location in enumerate(map(Location.parse, image_paths)):
        bucket = "" if location.is_local else location.path.split("/", 1)[0]
        stores.setdefault((location.scheme, bucket, location.query), []).append((position, location))
    chunks = [
        images[start : start + _LOOK_UP] for images in stores.values() for start in range(0, len(images), _LOOK_UP)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        answers = pool.map(lambda chunk: _look_up([location for _, location in chunk], limits, guard), chunks)
        failures = {
            position: skipped
            for chunk, results in zip(chunks, answers, strict=True)
            for (position, _), skipped in zip(chunk, results, strict=True)
            if skipped is not None
        }
    return dict(sorted(failures.items()))


def _look_up(locations: list[Location], limits: Limits, fence: Fence | None) -> list[Skipped | None]:
    """Files of one file system. If the call fails, each file is asked for by itself."""
    try:
        infos = locations[0].filesystem.get_file_info([location.path for location in locations])
    except (OSError, pa.ArrowException, UsageError) as exc:
        if len(locations) > 1:
            return [answer for location in locations for answer in _look_up([location], limits, fence)]
        return [Skipped(Reason.UNREADABLE, f"{locations[0]}: {getattr(exc, 'strerror', None) or exc}")]
    return [_judge(location, info, limits, fence) for location, info in zip(locations, infos, strict=True)]


def _judge(location: Location, info: fs.FileInfo, limits: Limits, fence: Fence | None) -> Skipped | None:
    if fence is not None and location.is_local and fence.is_left_by(location.path):
        return Skipped(Reason.FORBIDDEN, fence.refusal(location.path))
    if info.type == fs.FileType.NotFound:
        return Skipped(Reason.NOT_FOUND, f"no such file: {location}")
    if info.type != fs.FileType.File:
        kind = "a folder" if info.type == fs.FileType.Directory else "not a regular file"
        return Skipped(Reason.UNREADABLE, f"{location}: {kind}")
    if info.size > limits.bytes:
        text = f"{location}: {info.size / 1e6:.1f} MB, the limit is {limits.bytes / 1e6:g} MB"
        return Skipped(Reason.TOO_LARGE, text)
    return None


@dataclass(frozen=True)
class PairIssue:
    """How often an issue occurs. rows: the first cases, as (row, the earlier row that it relates to)."""

    count: int = 0
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class PairIssues:
    """Issues of pairs.

    duplicates: rows that repeat the pair of an earlier row in the same order. mirrored: pairs in both orders. selves:
    rows with one image on both sides. contradicting: pairs with both labels, in any order.
    """

    duplicates: PairIssue = PairIssue()
    mirrored: PairIssue = PairIssue()
    selves: PairIssue = PairIssue()
    contradicting: PairIssue = PairIssue()


class _Groups:
    """Rows grouped by unordered pair, in the manifest's order within a group, by one stable sort."""

    def __init__(self, a: np.ndarray, b: np.ndarray, most: int) -> None:
        a, b = a.astype(np.int64), b.astype(np.int64)
        key = np.minimum(a, b) << 32 | np.maximum(a, b)
        self.order = np.argsort(key, kind="stable")
        key = key[self.order]
        self.starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        self.ends = np.r_[self.starts[1:], len(key)]
        self._most = most

    def having(self, flags: np.ndarray) -> np.ndarray:
        """Which of G groups have a row with the flag: (G,) bool. flags: (N,) bool, sorted."""
        return np.logical_or.reduceat(flags, self.starts)

    def cases(self, marked: np.ndarray, values: np.ndarray, choose: _Choice) -> tuple[tuple[int, int], ...]:
        """Two rows of each of the first marked groups, chosen by their values. values: (N,), sorted."""
        groups = np.flatnonzero(marked)
        groups = groups[np.argsort(self.order[self.starts[groups]])][: self._most]
        cases = []
        for members in (slice(self.starts[group], self.ends[group]) for group in groups):
            later, earlier = choose(values[members])
            cases.append((int(self.order[members][later]), int(self.order[members][earlier])))
        return tuple(cases)


def find_pair_issues(a: np.ndarray, b: np.ndarray, labels: np.ndarray | None = None, *, most: int = 10) -> PairIssues:
    """The issues among N pairs.

    a, b: (N,) indices of images, below 2**31. labels: (N,) int8, 0, 1 or `BLANK`. most: number of cases to list.
    Takes about 50 bytes a row.
    """
    if not len(a):
        return PairIssues()
    groups = _Groups(a, b, most)
    turned, same = (a > b)[groups.order], (a == b)[groups.order]
    both = groups.having(turned) & groups.having(~turned)
    # All rows of a group repeat an earlier one, except the first in each order.
    repeated = (groups.ends - groups.starts) - 1 - both
    contradicting = PairIssue()
    if labels is not None:
        labels = labels[groups.order]
        labelled_both = groups.having(labels == 0) & groups.having(labels == 1)
        contradicting = PairIssue(int(labelled_both.sum()), groups.cases(labelled_both, labels, _unequal))
    return PairIssues(
        PairIssue(int(repeated.sum()), groups.cases(repeated > 0, turned, _repeated)),
        PairIssue(int(both.sum()), groups.cases(both, turned, _unequal)),
        PairIssue(int(same.sum()), groups.cases(same[groups.starts], turned, lambda _: (0, 0))),
        contradicting,
    )


def _repeated(values: np.ndarray) -> tuple[int, int]:
    """The positions of the first value that repeats an earlier one, and of that one."""
    repeat = next(position for position in range(1, len(values)) if values[position] in values[:position])
    return repeat, int(np.argmax(values == values[repeat]))


def _unequal(values: np.ndarray) -> tuple[int, int]:
    """The positions of the first value that differs from the first one, and of that one; blanks do not count."""
    first = int(np.argmax(values != BLANK))
    return int(np.argmax((values != values[first]) & (values != BLANK))), first
