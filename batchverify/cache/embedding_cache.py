"""EmbeddingCache: vectors and failures by image content, in shared append-only Parquet segments."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from batchverify.cache.segment import (
    DAMAGE,
    Entry,
    check_entries,
    failure_schema,
    failure_table,
    has_details,
    read_rows,
    read_segment,
    short_keys,
    table_failures,
    vector_schema,
    vector_table,
    write_segment,
)
from batchverify.documents import MOST_METADATA
from batchverify.errors import ArtifactError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.records import CACHED_REASONS, Skipped
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_denied, is_transient
from batchverify.storage.temporary import sweep

log = logging.getLogger(__name__)

VERSION = "v1"
# Files of writers on other machines, of which nothing else is known, are removed after this time.
STALE_SECONDS = 24 * 3600
# Pending entries are committed after this many rows or seconds.
COMMIT_ROWS = 4096
COMMIT_SECONDS = 60.0
# How often segments are listed at most while other processes write and replace them.
LISTINGS = 5
_Content = TypeVar("_Content")


@dataclass(frozen=True)
class KeyIndex:
    """The keys of all segments, sorted: 24 bytes per key.

    keys: (N,) S16, the first half of each key. segment: (N,) int32 into `segments`. row: (N,) int32 in that
    segment. failures: by whole key.
    """

    keys: np.ndarray
    segment: np.ndarray
    row: np.ndarray
    segments: tuple[str, ...]
    failures: dict[bytes, Skipped]

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Positions of K 32-byte keys in this index: (K,) int64, -1 where absent."""
        # numpy drops trailing zero bytes when it shows an S16 string, but not when it compares two.
        wanted = np.array([key[:16] for key in keys], dtype="S16")
        if not len(self.keys):
            return np.full(len(wanted), -1, np.int64)
        positions = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[positions] == wanted, positions, -1)


class EmbeddingCache:
    """Embeddings of one fingerprint below `root`, shared by any number of readers and writers.

    `get_many` reads, `append` collects, `commit` writes a segment atomically. Nothing is locked: at worst two
    writers write the same vector. Raises `ArtifactError` if the folder cannot be used or holds another
    fingerprint.

    details: leave out vectors whose details are not known, and read the details of the others. compute_path: the
    device, dtype and batch shape that the next segments state; set it before they are written.
    """

    def __init__(
        self,
        root: str | Location,
        fingerprint: EmbeddingFingerprint,
        *,
        index: KeyIndex | None = None,
        run_id: str = "",
        commit_rows: int = COMMIT_ROWS,
        commit_seconds: float = COMMIT_SECONDS,
        details: bool = False,
    ) -> None:
        self.root = Location.parse(str(root))
        self.fingerprint = fingerprint
        self.folder = self.root.join(VERSION, fingerprint.id)
        self.run_id, self.compute_path = run_id, ""
        self.bad_segments: set[str] = set()
        self._dimension, self._details = fingerprint.dimension, details
        self._commit_rows, self._commit_seconds = commit_rows, commit_seconds
        self._pending: list[Entry] = []
        # Keys of the pending entries and of the last commit.
        self._recent: set[bytes] = set()
        self._last_commit = time.monotonic()
        self._index = index

    @property
    def index(self) -> KeyIndex:
        """The keys known at the last `refresh`."""
        return self._index or self.refresh()

    def create(self) -> None:
        """Make the folders, write or check the fingerprint, and remove stale files of killed writers."""
        try:
            for folder in (self.root, self.folder.parent, self.folder):
                folder.make_folder()
            for name in ("data", "fail", "tmp"):
                self.folder.join(name).make_folder()
            self._write_or_check_fingerprint()
            self._remove_stale_files()
        except OSError as exc:
            raise self._unusable(exc) from exc

    def refresh(self) -> KeyIndex:
        """List the segments and read their keys. Of several rows of one key the first one counts."""
        columns = ["key", "sharpness"] if self._details else ["key"]
        found = self._read_all("data", vector_schema(self._dimension), self._known_keys, columns)
        keys, rows = [keys for keys, _ in found.values()], [rows for _, rows in found.values()]
        sorted_keys, first = np.unique(np.concatenate([np.zeros(0, "S16"), *keys]), return_index=True)
        segment = np.repeat(np.arange(len(keys), dtype=np.int32), list(map(len, keys)))[first]
        row = np.concatenate([np.zeros(0, np.int32), *rows])[first]
        self._index = KeyIndex(sorted_keys, segment, row, tuple(found), self._read_failures())
        return self._index

    def _known_keys(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """The short keys of the rows that count, and their (N,) int32 places in the segment."""
        keys, rows = short_keys(table), np.arange(table.num_rows, dtype=np.int32)
        known = has_details(table) if self._details else slice(None)
        return keys[known], rows[known]

    def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entries of 32-byte `keys`, None where absent. A vector takes precedence over a failure."""
        index = self.index
        for _ in range(LISTINGS):
            try:
                return self._get_many(index, keys)
            except FileNotFoundError:
                # Another process replaced a segment after the index was read.
                index = self.refresh()
        return self._get_many(index, keys, skip_absent=True)

    def append(self, entries: Iterable[Entry]) -> None:
        """Collect entries; commits if enough are pending or the last commit is a minute old.

        Ignores failures that do not follow from the image's bytes, so that the next run tries again, and
        entries that were collected before: after Ctrl-C the scheduler may append the same ones again.
        """
        new = [
            entry
            for entry in entries
            if (entry.skipped is None or entry.skipped.reason in CACHED_REASONS) and entry.key not in self._recent
        ]
        self._pending.extend(new)
        self._recent.update(entry.key for entry in new)
        if len(self._pending) >= self._commit_rows or time.monotonic() - self._last_commit > self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Write the pending entries durably. If this raises, what is not written stays pending."""
        self._last_commit = time.monotonic()
        self._recent = {entry.key for entry in self._pending} or self._recent
        vectors = [entry for entry in self._pending if entry.vector is not None]
        failures = [entry for entry in self._pending if entry.vector is None]
        try:
            if vectors:
                self._write(vectors)
            self._pending = failures
            if failures:
                self._write(failures)
            self._pending = []
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _write(self, entries: Sequence[Entry]) -> None:
        """Write a segment of entries that all have a vector, or all have none."""
        folder, made = ("fail", failure_table) if entries[0].vector is None else ("data", vector_table)
        write_segment(
            self.folder.join(folder),
            made(entries, self.run_id),
            self.folder.join("tmp"),
            fingerprint=self.fingerprint.id,
            compute_path=self.compute_path,
        )

    def _get_many(self, index: KeyIndex, keys: Sequence[bytes], *, skip_absent: bool = False) -> list[Entry | None]:
        entries: list[Entry | None] = [
            Entry(key, None, skipped=index.failures[key]) if key in index.failures else None for key in keys
        ]
        positions = index.find(keys)
        present = np.flatnonzero(positions >= 0)
        segments = index.segment[positions[present]]
        for segment in np.unique(segments).tolist():
            wanted = present[segments == segment]
            location = Location.parse(index.segments[segment])
            rows = self._read_rows(location, index.row[positions[wanted]], skip_absent)
            for number, entry in zip(wanted.tolist(), rows, strict=False):
                # The index holds only half of each key.
                if entry.key == keys[number]:
                    entries[number] = entry
        return entries

    def _read_rows(self, location: Location, rows: np.ndarray, skip_absent: bool) -> list[Entry]:
        """The entries at `rows` of a segment; none if it is damaged."""
        if str(location) in self.bad_segments:
            return []
        try:
            entries = read_rows(location, self.fingerprint.id, self._dimension, rows, details=self._details)
            check_entries(entries)
            return entries
        except FileNotFoundError:
            if skip_absent:
                return []
            raise
        except DAMAGE as exc:
            self._mark_bad(location, exc)
            return []

    def _read_all(
        self,
        folder: str,
        schema: pa.Schema,
        content: Callable[[pa.Table], _Content],
        columns: list[str] | None = None,
    ) -> dict[str, _Content]:
        """What the segments of a folder hold, by their paths, sorted; without absent and damaged ones.

        Listed until nothing is new: while a folder is listed, another process may write the rows of segments that it
        then deletes into a new one, and the listing may show neither.
        """
        found: dict[str, _Content] = {}
        for _ in range(LISTINGS):
            listed = {str(location): location for location in self._segments(folder)}
            found = {name: found[name] for name in listed if name in found}
            unread = listed.keys() - found.keys() - self.bad_segments
            if not unread:
                break
            for name in sorted(unread):
                try:
                    table = read_segment(listed[name], self.fingerprint.id, schema, columns=columns)
                    found[name] = content(table)
                except FileNotFoundError:
                    continue
                except DAMAGE as exc:
                    self._mark_bad(listed[name], exc)
        return dict(sorted(found.items()))

    def _read_failures(self) -> dict[bytes, Skipped]:
        """Failures by key. The latest counts: an earlier one that still held would not have been retried."""
        failures: dict[bytes, Skipped] = {}
        for each in self._read_all("fail", failure_schema(), table_failures).values():
            failures |= each
        return failures

    def _segments(self, folder: str) -> list[Location]:
        try:
            return [file for file, _ in self.folder.join(folder).files() if file.suffix == ".parquet"]
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _mark_bad(self, location: Location, exc: Exception) -> None:
        if isinstance(exc, OSError) and (is_transient(exc) or is_denied(exc)):
            # The store failed: that says nothing about the segment.
            raise self._unusable(exc) from exc
        self.bad_segments.add(str(location))
        is_damaged = getattr(exc, "errno", None) is None
        log.warning(
            "%s: %s cache segment skipped, its images are embedded again: %s",
            location,
            "damaged" if is_damaged else "unreadable",
            exc,
        )

    def _unusable(self, exc: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self.root}: the cache cannot be used ({exc}); choose another one with --cache or use --no-cache"
        )

    def _write_or_check_fingerprint(self) -> None:
        document = self.folder.join("fingerprint.json")
        if document.kind() == "absent":
            document.write_bytes(self.fingerprint.canonical.encode(), staging=self.folder.join("tmp"))
        elif document.read_bytes(MOST_METADATA).decode(errors="replace") != self.fingerprint.canonical:
            raise ArtifactError(f"{document}: does not match the name of its folder; move the folder away")

    def _remove_stale_files(self) -> None:
        if not self.folder.is_local:
            return
        staging = self.folder.join("tmp")
        sweep(Path(staging.path))
        for location, _ in staging.files():
            # Another process may publish, remove or own the file.
            with suppress(OSError):
                if time.time() - os.stat(location.path).st_mtime > STALE_SECONDS:  # noqa: PTH116
                    os.unlink(location.path)  # noqa: PTH108
