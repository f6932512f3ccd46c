"""`check`: a manifest looked at before it is scored: files, rows, and pairs that appear twice or contradict."""

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
from batchverify.storage.location import Location

# About what two CPU cores embed; a GPU does a hundred times as many.
IMAGES_PER_SECOND = 50.0
EXAMPLES = 10
# Files asked for in one call: an object store answers them side by side.
_LOOK_UP = 1024
_LOOKERS = 8
BLANK = -1
_Choice = Callable[[np.ndarray], tuple[int, int]]


@dataclass(frozen=True)
class Finding:
    """How many there are of something, and where the first ones stand."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What `check_manifest` found.

    types: by column. labels: rows with 0, with 1 and blank; None without a label column. refused: rows with
    an empty or forbidden cell. looked_up: images whose files were looked for; missing: those of them that
    are no readable file. The other four as in `pairs.Doubts`.
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
        """Whether nothing is refused, missing or contradicting; the other findings may be meant."""
        return not (self.missing.count or self.refused.count or self.contradicting.count)

    @property
    def unique_share(self) -> float:
        """Unique images per reference, 0 to 1: what is left to embed."""
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
            ("unique images", self._unique()),
            ("time to embed", self._time()),
        ]
        findings = [
            ("refused rows", self.refused, "an empty cell or a path that is not read"),
            ("missing images", self.missing, self._looked_up()),
            ("contradicting pairs", self.contradicting, "labels 0 and 1 for one pair"),
            ("duplicate rows", self.duplicates, "the pair stands there already"),
            ("mirrored pairs", self.mirrored, "(a, b) and (b, a)"),
            ("self pairs", self.selves, "one image on both sides"),
        ]
        lines = [f"{name:<20} {value}" for name, value in named]
        for name, finding, what in findings:
            lines.append(f"{name:<20} {finding.count:,}  ({what})")
            lines.extend(f"    {example}" for example in finding.examples)
        return [*lines, "no fault found" if self.ok else "the manifest has faults"]

    def _files(self) -> str:
        more = f" and {len(self.files) - 3:,} more" if len(self.files) > 3 else ""
        return ", ".join(self.files[:3]) + more

    def _labels(self) -> str:
        if self.labels is None:
            return "no column 'label'"
        counts = self.labels
        return f"{counts['0']:,} same (0), {counts['1']:,} different (1), {counts['blank']:,} blank"

    def _unique(self) -> str:
        references = 2 * self.rows
        return f"{self.unique_images:,} for {references:,} references ({self.unique_share:.1%})"

    def _looked_up(self) -> str:
        looked = f"{self.looked_up:,} of {self.unique_images:,} images looked for"
        reasons = "".join(f", {count:,} {reason}" for reason, count in self.missing_reasons.items())
        return looked + reasons

    def _time(self) -> str:
        return f"about {duration(self.seconds)}, an estimate at {self.images_per_second:g} images/s"


@dataclass(frozen=True)
class _Pairs:
    """The whole manifest as numbers. a, b: (N,) indices of images. labels: (N,) int8, -1 blank; or None."""

    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray | None

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Some of the rows."""
        return self.a[rows], self.b[rows], self.labels[rows] if self.labels is not None else None


def check_manifest(
    manifest: Manifest,
    *,
    every: bool = False,
    sample: int = 1000,
    seed: int = 0,
    limits: Limits | None = None,
    images_per_second: float = IMAGES_PER_SECOND,
) -> CheckReport:
    """Read a manifest and look for what is wrong with it; no image is opened.

    every: look for all image files, not only for a seeded sample of them. Raises `ManifestError` for what is
    no manifest.
    """
    scan = manifest.scan()
    pairs = _read(manifest, scan)
    refused = np.array([isinstance(each, Skipped) for each in scan.images])
    wanted = np.flatnonzero(~refused)
    unique = len(wanted)
    if not every and unique > sample:
        wanted = np.sort(np.random.default_rng(seed).choice(wanted, sample, replace=False))
    answers = look_up([str(scan.images[int(index)]) for index in wanted], limits or Limits())
    missing = {int(wanted[at]): skipped for at, skipped in answers.items()}
    places = _Places(manifest, scan, pairs)
    usable = np.flatnonzero(~(refused[pairs.a] | refused[pairs.b]))
    doubts = doubtful_pairs(*pairs.at(usable), most=EXAMPLES)
    return CheckReport(
        files=tuple(manifest.names),
        rows=scan.rows,
        types={LABEL if each.name == TRUE_LABEL else each.name: str(each.type) for each in scan.carried},
        labels=_label_counts(pairs.labels),
        unique_images=unique,
        refused=places.refused(refused),
        looked_up=len(wanted),
        missing=places.missing(missing),
        missing_reasons=dict(Counter(each.reason.value for each in missing.values())),
        duplicates=places.doubtful(doubts.duplicates, usable, "repeats row"),
        mirrored=places.doubtful(doubts.mirrored, usable, "turns round row"),
        selves=places.doubtful(doubts.selves, usable, "one image on both sides"),
        contradicting=places.doubtful(doubts.contradicting, usable, "contradicts row"),
        seconds=unique / images_per_second,
        images_per_second=images_per_second,
    )


def _read(manifest: Manifest, scan: Scan) -> _Pairs:
    kind = np.int32 if len(scan.images) < 2**31 else np.int64
    a, b = np.empty(scan.rows, kind), np.empty(scan.rows, kind)
    labels = np.empty(scan.rows, np.int8) if manifest.has_label else None
    for block in manifest.blocks(scan):
        rows = slice(block.first, block.first + len(block.a))
        a[rows], b[rows] = block.a, block.b
        if labels is not None:
            truth = block.carried.column(TRUE_LABEL)
            labels[rows] = truth.fill_null(BLANK).to_numpy(zero_copy_only=False)
    return _Pairs(a, b, labels)


def _label_counts(labels: np.ndarray | None) -> dict[str, int] | None:
    if labels is None:
        return None
    return {name: int((labels == value).sum()) for name, value in (("0", 0), ("1", 1), ("blank", BLANK))}


@dataclass(frozen=True)
class _Places:
    """Puts findings into words: file, row of that file, column."""

    manifest: Manifest
    scan: Scan
    pairs: _Pairs

    def refused(self, refused: np.ndarray) -> Finding:
        """Rows with a refused reference. refused: by image."""
        rows = np.flatnonzero(refused[self.pairs.a] | refused[self.pairs.b])
        examples = []
        for row in rows[:EXAMPLES]:
            on_a = refused[self.pairs.a[row]]
            skipped = self.scan.images[int((self.pairs.a if on_a else self.pairs.b)[row])]
            examples.append(self._cell(row, on_a, skipped))
        return Finding(len(rows), tuple(examples))

    def missing(self, missing: Mapping[int, Skipped]) -> Finding:
        """Images without a file, each with the first row that names it."""
        examples = []
        for index, skipped in list(missing.items())[:EXAMPLES]:
            row = np.argmax((self.pairs.a == index) | (self.pairs.b == index))
            examples.append(self._cell(row, self.pairs.a[row] == index, skipped))
        return Finding(len(missing), tuple(examples))

    def doubtful(self, doubt: Doubt, rows: np.ndarray, verb: str) -> Finding:
        """Doubtful pairs among some rows of the manifest."""
        examples = []
        for row, earlier in doubt.rows:
            file, number = self.manifest.place(self.scan, int(rows[row]))
            text = f"{file}: row {number}: {verb}"
            if row != earlier:
                place, other = self.manifest.place(self.scan, int(rows[earlier]))
                text += f" {other}" if place == file else f" {other} of {place}"
            examples.append(text)
        return Finding(doubt.count, tuple(examples))

    def _cell(self, row: np.integer, on_a: bool, skipped: str | Skipped) -> str:
        file, number = self.manifest.place(self.scan, int(row))
        column = self.manifest.columns.a if on_a else self.manifest.columns.b
        message = skipped.message if isinstance(skipped, Skipped) else skipped
        return f"{file}: row {number}: column '{column}': {message}"


def look_up(references: Sequence[str], limits: Limits) -> dict[int, Skipped]:
    """Which images are no readable file, by position, and why: absent, no regular file, or too large.

    references: absolute paths and URIs. Only the file system is asked; nothing is opened.
    """
    homes: dict[tuple[str, str, str], list[tuple[int, Location]]] = {}
    for position, location in enumerate(map(Location.parse, references)):
        bucket = "" if location.is_local else location.path.split("/", 1)[0]
        homes.setdefault((location.scheme, bucket, location.query), []).append((position, location))
    chunks = [each[at : at + _LOOK_UP] for each in homes.values() for at in range(0, len(each), _LOOK_UP)]
    with ThreadPoolExecutor(_LOOKERS) as pool:
        looked = pool.map(lambda chunk: _look_up([location for _, location in chunk], limits), chunks)
        found = {
            position: skipped
            for chunk, answers in zip(chunks, looked, strict=True)
            for (position, _), skipped in zip(chunk, answers, strict=True)
            if skipped is not None
        }
    return dict(sorted(found.items()))


def _look_up(locations: list[Location], limits: Limits) -> list[Skipped | None]:
    """Files of one file system; one that cannot be asked for does not spoil the others."""
    try:
        infos = locations[0].filesystem.get_file_info([location.path for location in locations])
    except (OSError, pa.ArrowException, UsageError) as exc:
        if len(locations) > 1:
            return [answer for location in locations for answer in _look_up([location], limits)]
        return [Skipped(Reason.UNREADABLE, f"{locations[0]}: {getattr(exc, 'strerror', None) or exc}")]
    return [_judged(location, info, limits) for location, info in zip(locations, infos, strict=True)]


def _judged(location: Location, info: fs.FileInfo, limits: Limits) -> Skipped | None:
    if info.type == fs.FileType.NotFound:
        return Skipped(Reason.NOT_FOUND, f"no such file: {location}")
    if info.type != fs.FileType.File:
        kind = "a folder" if info.type == fs.FileType.Directory else "not a regular file"
        return Skipped(Reason.UNREADABLE, f"{location}: {kind}")
    if info.size > limits.bytes:
        size, most = info.size / 1e6, limits.bytes / 1e6
        return Skipped(Reason.TOO_LARGE, f"{location}: {size:.1f} MB, the limit is {most:g} MB")
    return None


@dataclass(frozen=True)
class Doubt:
    """How often something occurs; rows: the first cases, as (row, earlier row that it belongs to)."""

    count: int = 0
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Doubts:
    """duplicates: rows that repeat an earlier row's pair, sides included. mirrored: pairs in both orders.

    selves: rows with one image on both sides. contradicting: pairs with both labels, in whatever order.
    """

    duplicates: Doubt = Doubt()
    mirrored: Doubt = Doubt()
    selves: Doubt = Doubt()
    contradicting: Doubt = Doubt()


class _Groups:
    """Rows brought together by unordered pair, in the manifest's order within each: one stable sort."""

    def __init__(self, a: np.ndarray, b: np.ndarray, most: int) -> None:
        a, b = a.astype(np.int64), b.astype(np.int64)
        key = np.minimum(a, b) << 32 | np.maximum(a, b)
        self.order = np.argsort(key, kind="stable")
        key = key[self.order]
        self.starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        self.ends = np.r_[self.starts[1:], len(key)]
        self._most = most

    def having(self, flags: np.ndarray) -> np.ndarray:
        """Which groups have a row with the flag. flags: (N,) bool, sorted; returns (G,) bool."""
        return np.logical_or.reduceat(flags, self.starts)

    def cases(self, marked: np.ndarray, values: np.ndarray, choose: _Choice) -> tuple[tuple[int, int], ...]:
        """The first marked groups: two rows each, chosen by their values. values: (N,), sorted."""
        groups = np.flatnonzero(marked)
        groups = groups[np.argsort(self.order[self.starts[groups]])][: self._most]
        found = []
        for members in (slice(self.starts[group], self.ends[group]) for group in groups):
            later, earlier = choose(values[members])
            found.append((int(self.order[members][later]), int(self.order[members][earlier])))
        return tuple(found)


def doubtful_pairs(
    a: np.ndarray, b: np.ndarray, labels: np.ndarray | None = None, *, most: int = 10
) -> Doubts:
    """Find them among N rows.

    a, b: (N,) indices of images, below 2**31. labels: (N,) int8, 0, 1 or `BLANK`. most: cases that are
    listed. Takes about 50 bytes a row.
    """
    if not len(a):
        return Doubts()
    groups = _Groups(a, b, most)
    turned, same = (a > b)[groups.order], (a == b)[groups.order]
    both = groups.having(turned) & groups.having(~turned)
    # A pair's rows that repeat no earlier one are as many as the orders in which it stands there.
    repeated = (groups.ends - groups.starts) - 1 - both
    contradicting = Doubt()
    if labels is not None:
        labels = labels[groups.order]
        torn = groups.having(labels == 0) & groups.having(labels == 1)
        contradicting = Doubt(int(torn.sum()), groups.cases(torn, labels, _unequal))
    return Doubts(
        Doubt(int(repeated.sum()), groups.cases(repeated > 0, turned, _repeated)),
        Doubt(int(both.sum()), groups.cases(both, turned, _unequal)),
        Doubt(int(same.sum()), groups.cases(same[groups.starts], turned, lambda values: (0, 0))),
        contradicting,
    )


def _repeated(values: np.ndarray) -> tuple[int, int]:
    """The positions of the first value that stands there already, and of the one it repeats."""
    at = next(at for at in range(1, len(values)) if values[at] in values[:at])
    return at, int(np.argmax(values == values[at]))


def _unequal(values: np.ndarray) -> tuple[int, int]:
    """The positions of the first value that differs from the first one, blanks aside, and of that one."""
    first = int(np.argmax(values != BLANK))
    return int(np.argmax((values != values[first]) & (values != BLANK))), first
