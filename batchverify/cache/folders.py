"""The folders of a cache, one for each fingerprint: their segments, what these hold, and what else lies there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow import fs

from batchverify.cache.embedding_cache import VERSION
from batchverify.cache.segment import (
    DAMAGE,
    SegmentName,
    bad_norm,
    failure_schema,
    read_segment,
    vector_column,
    vector_schema,
)
from batchverify.documents import MOST_METADATA, read_document
from batchverify.errors import ArtifactError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.storage.location import Location

KINDS = ("data", "fail")
QUARANTINE = "quarantine"
# Held by who rewrites segments: a file, in an object store a folder of claims.
LOCK = "lock"
_ID = re.compile(r"^[0-9a-f]{32}$")


@dataclass(frozen=True)
class StoredSegment:
    """A segment as it is listed. kind: `data`, `fail` or `quarantine`. size: bytes. name: what its name states."""

    location: Location
    kind: str
    size: int
    name: SegmentName


@dataclass
class FingerprintFolder:
    """The folder of one fingerprint: its document or the problem with it, its segments, and paths of other files.

    segments: those in use. quarantined: damaged ones that were moved aside.
    """

    location: Location
    document: Mapping[str, Any] | None
    problem: str
    segments: list[StoredSegment] = field(default_factory=list)
    quarantined: list[StoredSegment] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The fingerprint that the folder's name states."""
        return self.location.name

    def schema(self, kind: str) -> pa.Schema:
        """The columns of the segments in `data` or `fail`."""
        if kind == "fail":
            return failure_schema()
        return vector_schema(EmbeddingFingerprint(self.document or {}).dimension)

    def read(self, segment: StoredSegment, columns: list[str] | None = None) -> pa.Table | Exception:
        """A segment's table, or why it cannot be trusted. Raises FileNotFoundError if it is gone."""
        errors: list[Exception] = []
        for kind in ("data", "fail") if segment.kind == QUARANTINE else (segment.kind,):
            try:
                return read_segment(segment.location, self.id, self.schema(kind), columns=columns)
            except FileNotFoundError:
                raise
            except DAMAGE as exc:
                errors.append(exc)
        # A quarantined segment lacks the columns of one kind; as the other kind it says what is wrong.
        return next((error for error in errors if not str(error).endswith(" is missing")), errors[0])


def find_folders(root: Location) -> tuple[list[FingerprintFolder], list[str]]:
    """The folders of all fingerprints below a root, and the paths of what is not part of a cache."""
    children = _list(root)
    foreign = [str(path) for path, info in children if not (_is_folder(info) and path.name == VERSION)]
    folders = []
    for path, info in _list(root.join(VERSION)):
        if _is_folder(info) and _ID.match(path.name):
            folders.append(read_folder(path))
        else:
            foreign.append(str(path))
    return folders, foreign


def read_folder(location: Location) -> FingerprintFolder:
    """List the folder of one fingerprint. Raises `ArtifactError` if that fails."""
    folder = FingerprintFolder(location, *_document(location))
    children = _list(location)
    for path, info in children:
        known = (*KINDS, "tmp", QUARANTINE, LOCK) if _is_folder(info) else ("fingerprint.json", LOCK)
        if path.name not in known:
            folder.foreign.append(str(path))
    for kind in KINDS:
        for path, info in _list(location.join(kind)):
            parsed = SegmentName.parse(path.name) if info.type == fs.FileType.File else None
            if parsed is None:
                folder.foreign.append(str(path))
            else:
                folder.segments.append(StoredSegment(path, kind, info.size, parsed))
    aside = [path for path, info in children if path.name == QUARANTINE and _is_folder(info)]
    for path, info in (each for folder_path in aside for each in _list(folder_path)):
        parsed = SegmentName.parse(path.name)
        if parsed is not None:
            folder.quarantined.append(StoredSegment(path, QUARANTINE, info.size, parsed))
    return folder


def _document(location: Location) -> tuple[Mapping[str, Any] | None, str]:
    """The content of a folder's `fingerprint.json`, and what is wrong with it."""
    try:
        document = read_document(location.join("fingerprint.json").read_bytes(MOST_METADATA))
        if not isinstance(document, dict) or EmbeddingFingerprint(document).id != location.name:
            raise ValueError("does not match the name of its folder")
    except FileNotFoundError:
        return None, "is missing; the next run with these settings writes it again"
    except DAMAGE as exc:
        return None, one_line(exc)
    return document, ""


def _list(location: Location) -> list[tuple[Location, fs.FileInfo]]:
    """The contents of a folder by name; none if it is absent."""
    try:
        infos = location.infos()
    except OSError as exc:
        raise ArtifactError(f"{location}: the cache cannot be listed: {exc}") from exc
    return [(location.join(info.base_name), info) for info in sorted(infos, key=lambda info: info.base_name)]


def _is_folder(info: fs.FileInfo) -> bool:
    return info.type == fs.FileType.Directory


def tables(
    folder: FingerprintFolder, *, keys_only: bool = False
) -> Iterator[tuple[StoredSegment, pa.Table | Exception]]:
    """Every segment with its table or the reason why it cannot be trusted; keys_only: of `data/` segments."""
    for segment in folder.segments:
        # Removed since the listing.
        with suppress(FileNotFoundError):
            yield segment, folder.read(segment, ["key"] if keys_only and segment.kind == "data" else None)


def bad_vectors(table: pa.Table) -> ValueError | None:
    """What is wrong with a table's vectors, if one is not of length 1; None for a table without vectors."""
    if "embedding" not in table.column_names or not table.num_rows:
        return None
    problem = bad_norm(vector_column(table))
    return ValueError(problem) if problem else None


def system_error(exc: Exception) -> str:
    """Why the operating system refused to read a file, which says nothing about its contents; else empty."""
    return os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno is not None else ""


def one_line(exc: Exception) -> str:
    """Why a segment cannot be trusted, for people."""
    reason = system_error(exc)
    return f"cannot be read: {reason}" if reason else " ".join(str(exc).split())
