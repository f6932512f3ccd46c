"""`cache info` and `cache verify`: what a cache holds, and what is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.cache.folders import (
    QUARANTINE,
    FingerprintFolder,
    StoredSegment,
    bad_vectors,
    find_folders,
    one_line,
    system_error,
    tables,
)
from batchverify.cache.segment import short_keys, table_failures
from batchverify.errors import ArtifactError, UsageError
from batchverify.storage.location import Location, publish


def cache_info(root: str | Location) -> list[FingerprintInfo]:
    """What the cache at `root` holds, by fingerprint; an absent cache is empty.

    Raises `ArtifactError` if the folder cannot be listed.
    """
    folders, _ = find_folders(Location.parse(str(root)))
    return [_info(folder) for folder in folders]


def verify_cache(root: str | Location, *, quarantine: bool = False) -> CacheReport:
    """Read and check every segment of every fingerprint.

    Checks page checksums, the row count in the name, the fingerprint in the footer, columns and types, keys
    without nulls, and vectors of norm 1. With `quarantine`, bad segments of a local cache are moved to
    `<fingerprint>/quarantine/`; one that this process may not read stays. Raises `ArtifactError` if the folder
    cannot be listed or a segment cannot be moved, `UsageError` for `quarantine` in an object store.
    """
    location = Location.parse(str(root))
    if quarantine and not location.is_local:
        raise UsageError(f"{location}: only segments of a local cache can be moved; run verify without --quarantine")
    folders, foreign = find_folders(location)
    problems: list[Problem] = []
    quarantined: list[str] = []
    for folder in folders:
        if folder.problem:
            problems.append(Problem(str(folder.location.join("fingerprint.json")), folder.problem))
        for segment, exc in _bad_segments(folder):
            problems.append(Problem(str(segment.location), one_line(exc)))
            if quarantine and not system_error(exc):
                quarantined.append(_move_to_quarantine(segment.location))
    segments = [segment for folder in folders for segment in folder.segments]
    return CacheReport(
        len(folders),
        len(segments),
        sum(segment.name.rows for segment in segments),
        sum(segment.size for segment in segments),
        tuple(problems),
        tuple(foreign + [path for folder in folders for path in folder.foreign]),
        tuple(quarantined),
    )


@dataclass(frozen=True)
class FingerprintInfo:
    """What a cache holds under one fingerprint.

    document: the settings that `id` stands for, None if `fingerprint.json` cannot be read.
    vectors: rows with a vector. keys: distinct images with one. failures: distinct images without, by reason.
    segments, bytes: number and total size of the segments. oldest, newest: when they were written, UTC.
    damaged: paths of segments that cannot be read. foreign: paths of files that are not part of a cache.
    """

    id: str
    document: Mapping[str, Any] | None
    vectors: int = 0
    keys: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    segments: int = 0
    bytes: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None
    damaged: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: the fingerprint, its settings, its contents, and foreign files."""
        failures = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.items())
        span = f", written {self.oldest:%Y-%m-%d %H:%M} to {self.newest:%Y-%m-%d %H:%M} UTC" if self.oldest else ""
        return [
            f"{self.id}  {_settings(self.document)}",
            f"  images with a vector: {self.keys:,} ({self.vectors:,} rows), without: {failures or 'none'}",
            f"  segments: {self.segments:,}, {_megabytes(self.bytes)}{span}",
            *(f"  damaged: {path} (see `batchverify cache verify`)" for path in self.damaged),
            *(f"  not part of a cache: {path}" for path in self.foreign),
        ]

    def to_json(self) -> dict[str, Any]:
        """For `--json`; times in ISO 8601."""
        times = {"oldest": self.oldest, "newest": self.newest}
        return asdict(self) | {name: time.isoformat() if time else None for name, time in times.items()}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a segment or a `fingerprint.json`."""

    path: str
    what: str


@dataclass(frozen=True)
class CacheReport:
    """What `verify_cache` read and found. foreign: paths that are not part of a cache. quarantined: new paths."""

    fingerprints: int
    segments: int
    rows: int
    bytes: int
    problems: tuple[Problem, ...]
    foreign: tuple[str, ...]
    quarantined: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems; foreign files are none."""
        return not self.problems

    def lines(self) -> list[str]:
        """For people: every finding, then the totals."""
        read = f"{self.fingerprints:,} fingerprints, {self.segments:,} segments, {self.rows:,} rows"
        count = f"{len(self.problems):,}" if self.problems else "no"
        return [
            *(f"{problem.path}: {problem.what}" for problem in self.problems),
            *(f"moved to {path}" for path in self.quarantined),
            *(f"not part of a cache: {path}" for path in self.foreign),
            f"{read}, {_megabytes(self.bytes)} read: {count} problems",
        ]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"ok": self.ok} | asdict(self)


def _info(folder: FingerprintFolder) -> FingerprintInfo:
    keys: list[np.ndarray] = [np.zeros(0, "S16")]
    failures: dict[bytes, str] = {}
    damaged: list[str] = []
    for segment, table in tables(folder, keys_only=True):
        if isinstance(table, Exception):
            damaged.append(str(segment.location))
        elif "reason" in table.column_names:
            failures |= {key: skipped.reason.value for key, skipped in table_failures(table).items()}
        else:
            keys.append(short_keys(table))
    embedded = np.unique(np.concatenate(keys))
    without = ~np.isin(np.array([key[:16] for key in failures], dtype="S16"), embedded)
    reasons = Counter(compress(failures.values(), without))
    segments = folder.segments
    written = [segment.name.written for segment in segments]
    return FingerprintInfo(
        folder.id,
        folder.document,
        vectors=sum(map(len, keys)),
        keys=len(embedded),
        failures=dict(sorted(reasons.items())),
        segments=len(segments),
        bytes=sum(segment.size for segment in segments),
        oldest=_utc(min(written)) if written else None,
        newest=_utc(max(written)) if written else None,
        damaged=tuple(damaged),
        foreign=tuple(folder.foreign),
    )


def _bad_segments(folder: FingerprintFolder) -> Iterator[tuple[StoredSegment, Exception]]:
    for segment, table in tables(folder):
        error = table if isinstance(table, Exception) else bad_vectors(table)
        if error is not None:
            yield segment, error


def _move_to_quarantine(location: Location) -> str:
    folder = location.parent.parent.join(QUARANTINE)
    target = folder.join(location.name)
    try:
        folder.make_folder()
        publish(Path(location.path), Path(target.path))
    except OSError as exc:
        raise ArtifactError(f"{location}: cannot be moved to {folder}: {exc}") from exc
    return str(target)


def _utc(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds // 1_000_000_000, timezone.utc)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _settings(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return "settings unknown: fingerprint.json cannot be read"
    crop = document.get("crop")
    crop = crop if isinstance(crop, Mapping) else {}
    margin = f", margin {crop['margin']}" if "margin" in crop else ""
    backbone = str(document.get("backbone"))[:12]
    return f"backbone {backbone}, crop {crop.get('mode')}{margin}, views {document.get('tta')}"
