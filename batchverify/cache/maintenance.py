"""`cache info` and `cache verify`: what the cache holds, and what of it is damaged."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from batchverify.cache.embedding_cache import VERSION
from batchverify.cache.segment import (
    DAMAGE,
    DIMENSION,
    SegmentName,
    failure_schema,
    read_segment,
    short_keys,
    table_failures,
    vector_column,
    vector_schema,
)
from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.storage.location import Location, publish

QUARANTINE = "quarantine"
# Half precision moves a norm by less than 0.001.
NORM_TOLERANCE = 0.01
FOLDER = fs.FileType.Directory
_ID = re.compile(r"^[0-9a-f]{32}$")


@dataclass(frozen=True)
class _Segment:
    location: Location
    size: int
    name: SegmentName


@dataclass
class _Folder:
    """The folder of one fingerprint, listed: segments by name of ours, everything else as foreign."""

    location: Location
    data: list[_Segment]
    fail: list[_Segment]
    foreign: list[str]

    @property
    def id(self) -> str:
        return self.location.name

    def document(self) -> Mapping[str, Any]:
        """What `fingerprint.json` says; one of `DAMAGE` where that is not what the name stands for."""
        file = self.location.join("fingerprint.json")
        document = json.loads(file.read_bytes())
        if not isinstance(document, dict) or EmbeddingFingerprint(document).id != self.id:
            raise ValueError("is not the fingerprint that the folder's name stands for")
        return document

    def dimension(self) -> int:
        """How long the vectors are; the usual length where the document cannot say."""
        try:
            return int(str(self.document().get("dimension", DIMENSION)))
        except DAMAGE:
            return DIMENSION


def cache_info(root: str | Location) -> list[FingerprintInfo]:
    """What the cache at `root` holds, by fingerprint; an absent one holds nothing.

    Raises `ArtifactError` where the folder cannot be listed.
    """
    folders, _ = _folders(Location.parse(str(root)))
    return [_info(folder) for folder in folders]


def verify_cache(root: str | Location, *, quarantine: bool = False) -> CacheReport:
    """Read every segment of every fingerprint to its last byte and hold it to its checks.

    Checked: page checksums, the row count that the name states, the fingerprint that the footer states,
    columns and types, keys without nulls, vectors of norm 1 and finite. With `quarantine` bad segments of a
    local cache move to `<fingerprint>/quarantine/`; one that this process may not read stays.
    Raises `ArtifactError` where the folder cannot be listed or a segment cannot be moved, `UsageError` for a
    quarantine in an object store.
    """
    location = Location.parse(str(root))
    if quarantine and not location.is_local:
        raise UsageError(
            f"{location}: segments are moved in local caches only; run verify without --quarantine"
        )
    folders, foreign = _folders(location)
    problems: list[Problem] = []
    moved: list[str] = []
    for folder in folders:
        problems += _document_problems(folder)
        for segment, exc in _bad_segments(folder):
            problems.append(Problem(str(segment.location), _sentence(exc)))
            if quarantine and not _unreachable(exc):
                moved.append(_set_aside(segment.location))
    segments = [segment for folder in folders for segment in (*folder.data, *folder.fail)]
    return CacheReport(
        len(folders),
        len(segments),
        sum(segment.name.rows for segment in segments),
        sum(segment.size for segment in segments),
        tuple(problems),
        tuple(foreign + [path for folder in folders for path in folder.foreign]),
        tuple(moved),
    )


def _folders(root: Location) -> tuple[list[_Folder], list[str]]:
    """The fingerprints' folders below a root, and the paths of what has no place in a cache."""
    foreign: list[str] = []
    folders = []
    for child, info in _listed(root):
        if not (info.type == FOLDER and child.name == VERSION):
            foreign.append(str(child))
    for child, info in _listed(root.join(VERSION)):
        if info.type == FOLDER and _ID.match(child.name):
            folders.append(_folder(child))
        else:
            foreign.append(str(child))
    return folders, foreign


def _folder(location: Location) -> _Folder:
    folder = _Folder(location, [], [], [])
    for child, info in _listed(location):
        known = ("data", "fail", "tmp", QUARANTINE) if info.type == FOLDER else ("fingerprint.json",)
        if child.name not in known:
            folder.foreign.append(str(child))
    for name, segments in (("data", folder.data), ("fail", folder.fail)):
        for child, info in _listed(location.join(name)):
            parsed = SegmentName.parse(child.name) if info.type == fs.FileType.File else None
            if parsed is None:
                folder.foreign.append(str(child))
            else:
                segments.append(_Segment(child, info.size, parsed))
    return folder


def _listed(location: Location) -> list[tuple[Location, fs.FileInfo]]:
    """What lies in a folder, sorted; nothing when it is absent."""
    try:
        found = location.filesystem.get_file_info(fs.FileSelector(location.path, allow_not_found=True))
    except OSError as exc:
        raise ArtifactError(f"{location}: the cache cannot be listed: {exc}") from exc
    by_name = {info.base_name: info for info in found}
    return [(location.join(name), by_name[name]) for name in sorted(by_name)]


def _info(folder: _Folder) -> FingerprintInfo:
    keys: list[np.ndarray] = [np.zeros(0, "S16")]
    failures: dict[bytes, str] = {}
    damaged: list[str] = []
    for segment, read in _each(folder, keys_only=True):
        if isinstance(read, Exception):
            damaged.append(str(segment.location))
        elif "reason" in read.column_names:
            failures |= {key: skipped.reason.value for key, skipped in table_failures(read).items()}
        else:
            keys.append(short_keys(read))
    known = np.unique(np.concatenate(keys))
    failed = np.array([key[:16] for key in failures], dtype="S16")
    without = ~np.isin(failed, known)
    reasons = Counter(reason for reason, counts in zip(failures.values(), without, strict=True) if counts)
    segments = [*folder.data, *folder.fail]
    written = [segment.name.written for segment in segments]
    return FingerprintInfo(
        folder.id,
        _document_or_none(folder),
        vectors=sum(map(len, keys)),
        keys=len(known),
        failures=dict(sorted(reasons.items())),
        segments=len(segments),
        bytes=sum(segment.size for segment in segments),
        oldest=_moment(min(written)) if written else None,
        newest=_moment(max(written)) if written else None,
        damaged=tuple(damaged),
        foreign=tuple(folder.foreign),
    )


def _each(folder: _Folder, *, keys_only: bool = False) -> Iterator[tuple[_Segment, pa.Table | Exception]]:
    """Every segment with its table, or with why it cannot be trusted; of `data/` perhaps the keys alone."""
    vectors, failures = vector_schema(folder.dimension()), failure_schema()
    plan = [(segment, vectors, ["key"] if keys_only else None) for segment in folder.data]
    plan += [(segment, failures, None) for segment in folder.fail]
    for segment, schema, columns in plan:
        try:
            yield segment, read_segment(segment.location, folder.id, schema, columns=columns)
        except FileNotFoundError:
            # Compacted since it was listed.
            continue
        except DAMAGE as exc:
            yield segment, exc


def _document_or_none(folder: _Folder) -> Mapping[str, Any] | None:
    try:
        return folder.document()
    except DAMAGE:
        return None


def _document_problems(folder: _Folder) -> list[Problem]:
    path = str(folder.location.join("fingerprint.json"))
    try:
        folder.document()
    except FileNotFoundError:
        return [Problem(path, "is missing; the next run with these settings writes it again")]
    except DAMAGE as exc:
        return [Problem(path, _sentence(exc))]
    return []


def _bad_segments(folder: _Folder) -> Iterator[tuple[_Segment, Exception]]:
    for segment, read in _each(folder):
        wrong = read if isinstance(read, Exception) else _bad_norm(read)
        if wrong is not None:
            yield segment, wrong


def _bad_norm(table: pa.Table) -> ValueError | None:
    if "embedding" not in table.column_names or not table.num_rows:
        return None
    norms = np.linalg.norm(vector_column(table).astype(np.float32), axis=1)
    # Written so that a norm that is not a number counts as bad.
    bad = np.flatnonzero(~(np.abs(norms - 1) < NORM_TOLERANCE))
    if not len(bad):
        return None
    return ValueError(f"row {bad[0]}: the vector's norm is {norms[bad[0]]:.4g}, not 1 ({len(bad)} such rows)")


def _unreachable(exc: Exception) -> bool:
    """Whether the system refused to read the file: that says nothing about its contents."""
    return isinstance(exc, OSError) and exc.errno is not None


def _set_aside(location: Location) -> str:
    folder = location.parent.parent.join(QUARANTINE)
    target = folder.join(location.name)
    try:
        folder.make_folder()
        publish(Path(location.path), Path(target.path))
    except OSError as exc:
        raise ArtifactError(f"{location}: cannot be moved to {folder}: {exc}") from exc
    return str(target)


def _sentence(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno is not None:
        return f"cannot be read: {os.strerror(exc.errno)}"
    return " ".join(str(exc).split())


def _moment(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds // 1_000_000_000, timezone.utc)


@dataclass(frozen=True)
class FingerprintInfo:
    """What a cache holds under one fingerprint.

    document: the settings that `id` stands for, None where `fingerprint.json` cannot be read.
    vectors: rows with a vector. keys: distinct images with one. failures: distinct images without, by reason.
    segments, bytes: of files with names of ours. oldest, newest: when they were written, UTC.
    damaged: paths of segments that cannot be read. foreign: paths of what is no part of a cache.
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
        """For people: the fingerprint, its settings, its contents, and what does not belong."""
        failures = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.items())
        span = (
            f", written {self.oldest:%Y-%m-%d %H:%M} to {self.newest:%Y-%m-%d %H:%M} UTC"
            if self.oldest
            else ""
        )
        return [
            f"{self.id}  {_settings(self.document)}",
            f"  images with a vector {self.keys:,} (rows {self.vectors:,}), without: {failures or 'none'}",
            f"  segments {self.segments:,}, {megabytes(self.bytes)}{span}",
            *(f"  damaged: {path} (`batchverify cache verify` says why)" for path in self.damaged),
            *(f"  not part of a cache: {path}" for path in self.foreign),
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for machines; times in ISO 8601."""
        times = {"oldest": self.oldest, "newest": self.newest}
        return asdict(self) | {name: each.isoformat() if each else None for name, each in times.items()}


@dataclass(frozen=True)
class Problem:
    """Something wrong with a cache: a segment or a `fingerprint.json`, by its path, and what."""

    path: str
    what: str


@dataclass(frozen=True)
class CacheReport:
    """What `verify_cache` read and found. quarantined: where the bad segments lie now."""

    fingerprints: int
    segments: int
    rows: int
    bytes: int
    problems: tuple[Problem, ...]
    foreign: tuple[str, ...]
    quarantined: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; foreign files are not the cache's fault."""
        return not self.problems

    def lines(self) -> list[str]:
        """For people: every finding, then the sum."""
        read = f"{self.fingerprints:,} fingerprints, {self.segments:,} segments, {self.rows:,} rows"
        found = f"{len(self.problems):,} problems" if self.problems else "nothing wrong"
        return [
            *(f"{problem.path}: {problem.what}" for problem in self.problems),
            *(f"moved to {path}" for path in self.quarantined),
            *(f"not part of a cache: {path}" for path in self.foreign),
            f"{read}, {megabytes(self.bytes)} read: {found}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {"ok": self.ok} | asdict(self)


def megabytes(size: int) -> str:
    """A size for people: `0.3 MB`."""
    return f"{size / 1e6:,.1f} MB"


def _settings(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return "settings unknown: fingerprint.json cannot be read"
    crop = document.get("crop")
    crop = crop if isinstance(crop, Mapping) else {}
    margin = f", margin {crop['margin']}" if "margin" in crop else ""
    backbone = str(document.get("backbone"))[:12]
    return f"backbone {backbone}, crop {crop.get('mode')}{margin}, views {document.get('tta')}"
