"""EmbeddingCache: vectors and failures by image content, in append-only Parquet segments that runs share."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from batchverify.cache.segment import (
    DAMAGE,
    DIMENSION,
    Entry,
    Provenance,
    failure_schema,
    failure_table,
    read_rows,
    read_segment,
    short_keys,
    table_failures,
    vector_schema,
    vector_table,
    write_segment,
)
from batchverify.errors import ArtifactError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.records import CACHED_REASONS, Skipped
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_denied, is_transient

log = logging.getLogger(__name__)

VERSION = "v1"
STALE_SECONDS = 24 * 3600
# A commit per this many rows or seconds, whichever comes first.
COMMIT_ROWS = 4096
COMMIT_SECONDS = 60.0


@dataclass(frozen=True)
class KeyIndex:
    """The keys of all segments, sorted: 24 bytes a key.

    keys: (N,) S16. segment: (N,) int32 into `segments`. row: (N,) int32 in that segment. failures: by key.
    """

    keys: np.ndarray
    segment: np.ndarray
    row: np.ndarray
    segments: tuple[str, ...]
    failures: dict[bytes, Skipped]

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Positions of 32-byte keys in this index, -1 where absent: (K,) int64."""
        # Fixed width: numpy drops trailing zero bytes when it shows such a string, not when it compares two.
        wanted = np.array([key[:16] for key in keys], dtype="S16")
        if not len(self.keys):
            return np.full(len(wanted), -1, np.int64)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, at, -1)


class EmbeddingCache:
    """Embeddings of one fingerprint below `root`, shared by any number of readers and writers.

    `get_many` reads; `append` collects and `commit` writes segments that are complete or absent. Nothing
    is locked: two writers at most write a vector twice. Raises `ArtifactError` where the folder cannot be
    used or belongs to another fingerprint.
    """

    def __init__(
        self,
        root: str | Location,
        fingerprint: EmbeddingFingerprint,
        *,
        index: KeyIndex | None = None,
        run_id: str = "",
        compute_path: str = "",
        commit_rows: int = COMMIT_ROWS,
        commit_seconds: float = COMMIT_SECONDS,
    ) -> None:
        self.root = Location.parse(str(root))
        self.fingerprint = fingerprint
        self.folder = self.root.join(VERSION, fingerprint.id)
        self.provenance = Provenance(fingerprint.id, run_id, compute_path)
        self.bad_segments: set[str] = set()
        self._dimension = int(fingerprint.document.get("dimension", DIMENSION))
        self._commit_rows, self._commit_seconds = commit_rows, commit_seconds
        self._pending: list[Entry] = []
        # Keys of what is pending and of what was committed last.
        self._recent: set[bytes] = set()
        self._last_commit = time.monotonic()
        self._index = index

    def state_compute_path(self, compute_path: str) -> None:
        """Device, dtype and batch shape behind what is appended from now on; they stand in its segments."""
        self.provenance = replace(self.provenance, compute_path=compute_path)

    @property
    def index(self) -> KeyIndex:
        """The keys known at the last `refresh`."""
        return self._index or self.refresh()

    def create(self) -> None:
        """Make the folders and state the fingerprint; stale staging files of killed writers are swept."""
        try:
            for folder in (self.root, self.folder.parent, self.folder):
                folder.make_folder()
            for name in ("data", "fail", "tmp"):
                self.folder.join(name).make_folder()
            self._state_fingerprint()
            self._sweep()
        except OSError as exc:
            raise self._unusable(exc) from exc

    def refresh(self) -> KeyIndex:
        """List the segments and read their keys."""
        names, keys = [], []
        schema = vector_schema(self._dimension)
        for location in self._segments("data"):
            table = self._read(location, schema, ["key"])
            if table is not None:
                names.append(str(location))
                keys.append(short_keys(table))
        lengths = [len(each) for each in keys]
        # The first of equal keys is kept: of several rows of one key the earliest segment's.
        sorted_keys, first = np.unique(np.concatenate([np.zeros(0, "S16"), *keys]), return_index=True)
        segment = np.repeat(np.arange(len(keys), dtype=np.int32), lengths)[first]
        row = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)])[first]
        self._index = KeyIndex(sorted_keys, segment, row, tuple(names), self._read_failures())
        return self._index

    def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entries of 32-byte `keys`, None where there is none. A vector beats a failure."""
        try:
            return self._get_many(self.index, keys)
        except FileNotFoundError:
            # A compactor replaced a segment after the index was read.
            return self._get_many(self.refresh(), keys, gone_is_missing=True)

    def append(self, entries: Iterable[Entry]) -> None:
        """Collect entries; they are committed once there are enough or a minute has passed.

        Failures that do not follow from an image's bytes are passed over: the next run tries again. So are
        entries that were just collected: after Ctrl-C in the middle of it they are handed in once more.
        """
        kept = [
            each
            for each in entries
            if (each.skipped is None or each.skipped.reason in CACHED_REASONS)
            and each.key not in self._recent
        ]
        self._pending.extend(kept)
        self._recent.update(each.key for each in kept)
        if (
            len(self._pending) >= self._commit_rows
            or time.monotonic() - self._last_commit > self._commit_seconds
        ):
            self.commit()

    def commit(self) -> None:
        """Write what was collected; when this returns it is durable. When it raises, nothing is forgotten."""
        self._last_commit = time.monotonic()
        self._recent = {entry.key for entry in self._pending} or self._recent
        vectors = [entry for entry in self._pending if entry.vector is not None]
        failures = [entry for entry in self._pending if entry.vector is None]
        staging = self.folder.join("tmp")
        try:
            if vectors:
                table = vector_table(vectors, self.provenance.run_id)
                write_segment(self.folder.join("data"), table, self.provenance, staging)
            self._pending = failures
            if failures:
                table = failure_table(failures, self.provenance.run_id)
                write_segment(self.folder.join("fail"), table, self.provenance, staging)
            self._pending = []
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _get_many(
        self, index: KeyIndex, keys: Sequence[bytes], *, gone_is_missing: bool = False
    ) -> list[Entry | None]:
        entries: list[Entry | None] = [
            Entry(key, None, skipped=index.failures[key]) if key in index.failures else None for key in keys
        ]
        at = index.find(keys)
        present = np.flatnonzero(at >= 0)
        owners = index.segment[at[present]]
        for segment in np.unique(owners).tolist():
            wanted = present[owners == segment]
            location = Location.parse(index.segments[segment])
            found = self._read_rows(location, index.row[at[wanted]], gone_is_missing)
            for position, entry in zip(wanted.tolist(), found, strict=False):
                # The index knows half of each key.
                if entry.key == keys[position]:
                    entries[position] = entry
        return entries

    def _read_rows(self, location: Location, rows: np.ndarray, gone_is_missing: bool) -> list[Entry]:
        """The entries at `rows` of a segment; none when it is damaged."""
        if str(location) in self.bad_segments:
            return []
        try:
            return read_rows(location, self.fingerprint.id, self._dimension, rows)
        except FileNotFoundError:
            if gone_is_missing:
                return []
            raise
        except DAMAGE as exc:
            self._mark_bad(location, exc)
            return []

    def _read(
        self, location: Location, schema: pa.Schema, columns: list[str] | None = None
    ) -> pa.Table | None:
        """A segment's table; None for one that is gone or damaged, and damage is said once."""
        if str(location) in self.bad_segments:
            return None
        try:
            return read_segment(location, self.fingerprint.id, schema, columns=columns)
        except FileNotFoundError:
            return None
        except DAMAGE as exc:
            self._mark_bad(location, exc)
            return None

    def _read_failures(self) -> dict[bytes, Skipped]:
        """By key. The latest counts: an earlier one that still held would not have been tried again."""
        failures: dict[bytes, Skipped] = {}
        for location in self._segments("fail"):
            table = self._read(location, failure_schema())
            failures |= table_failures(table) if table is not None else {}
        return failures

    def _segments(self, folder: str) -> list[Location]:
        try:
            return [file for file, _ in self.folder.join(folder).files() if file.suffix == ".parquet"]
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _mark_bad(self, location: Location, exc: Exception) -> None:
        if isinstance(exc, OSError) and (is_transient(exc) or is_denied(exc)):
            # The store's fault says nothing of the segment.
            raise self._unusable(exc) from exc
        self.bad_segments.add(str(location))
        log.warning("%s: this cache segment is passed over, its images are embedded anew: %s", location, exc)

    def _unusable(self, exc: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self.root}: the cache cannot be used ({exc}); "
            "choose another place with --cache or use --no-cache"
        )

    def _state_fingerprint(self) -> None:
        stated = self.folder.join("fingerprint.json")
        if stated.kind() == "absent":
            stated.write_bytes(self.fingerprint.canonical.encode(), staging=self.folder.join("tmp"))
            return
        if stated.read_bytes().decode(errors="replace") != self.fingerprint.canonical:
            raise ArtifactError(
                f"{stated}: not the fingerprint that the folder's name stands for; move it away"
            )

    def _sweep(self) -> None:
        if not self.folder.is_local:
            return
        for location, _ in self.folder.join("tmp").files():
            # Another process may publish or sweep the file in this very moment, or own it.
            with suppress(OSError):
                if time.time() - os.stat(location.path).st_mtime > STALE_SECONDS:  # noqa: PTH116
                    os.unlink(location.path)  # noqa: PTH108
