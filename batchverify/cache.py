"""EmbeddingCache: vectors and failures by image content, in append-only Parquet segments that runs share."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchverify.errors import ArtifactError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.locations import Location
from batchverify.records import Skipped
from batchverify.segments import (
    DAMAGE,
    ROW_GROUP,
    Entry,
    Provenance,
    failure_table,
    read_segment,
    short_keys,
    table_entries,
    table_failures,
    vector_table,
    write_segment,
)

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
    ) -> None:
        self.root = Location.parse(str(root))
        self.fingerprint = fingerprint
        self.folder = self.root.join(VERSION, fingerprint.id)
        self.provenance = Provenance(fingerprint.id, run_id, compute_path)
        self.bad_segments: set[str] = set()
        self._pending: list[Entry] = []
        self._last_commit = time.monotonic()
        self._index = index

    @property
    def index(self) -> KeyIndex:
        """The keys known at the last `refresh`."""
        return self._index or self.refresh()

    def create(self) -> None:
        """Make the folders and state the fingerprint; stale staging files of killed writers are swept."""
        try:
            self.root.make_folder()
            for name in ("data", "fail", "tmp"):
                self.folder.join(name).make_folder()
            self._state_fingerprint()
            self._sweep()
        except OSError as exc:
            raise ArtifactError(
                f"{self.root}: the cache cannot be used ({exc}); choose another place with --cache or use --no-cache"
            ) from exc

    def refresh(self) -> KeyIndex:
        """List the segments and read their keys."""
        names, keys = [], []
        for location, _ in self.folder.join("data").files():
            table = self._read(location, columns=["key"])
            if table is not None:
                names.append(str(location))
                keys.append(short_keys(table))
        lengths = [len(each) for each in keys]
        # Stable: of several rows of one key the earliest segment's stays.
        sorted_keys, first = np.unique(np.concatenate([np.zeros(0, "S16"), *keys]), return_index=True)
        segment = np.repeat(np.arange(len(keys), dtype=np.int32), lengths)[first]
        row = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)])[first]
        self._index = KeyIndex(sorted_keys, segment, row, tuple(names), self._read_failures())
        return self._index

    def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entries of 32-byte `keys`, None where there is none. A vector beats a failure."""
        try:
            return self._get_many(keys)
        except FileNotFoundError:
            # A compactor replaced a segment after the index was read.
            self.refresh()
            return self._get_many(keys)

    def append(self, entries: Iterable[Entry]) -> None:
        """Collect entries; they are committed once there are enough or a minute has passed."""
        self._pending.extend(entries)
        if len(self._pending) >= COMMIT_ROWS or time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what was collected; when this returns it is durable."""
        pending, self._pending = self._pending, []
        self._last_commit = time.monotonic()
        vectors = [entry for entry in pending if entry.vector is not None]
        failures = [entry for entry in pending if entry.vector is None]
        staging = self.folder.join("tmp")
        try:
            if vectors:
                table = vector_table(vectors, self.provenance.run_id)
                write_segment(self.folder.join("data"), table, self.provenance, staging)
            if failures:
                table = failure_table(failures, self.provenance.run_id)
                write_segment(self.folder.join("fail"), table, self.provenance, staging)
        except OSError as exc:
            raise ArtifactError(f"{self.folder}: the cache could not be written: {exc}") from exc

    def _get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        index = self.index
        at = index.find(keys)
        entries: list[Entry | None] = [
            Entry(key, None, skipped=index.failures[key]) if key in index.failures else None for key in keys
        ]
        present = np.flatnonzero(at >= 0)
        owners = index.segment[at[present]]
        for segment in np.unique(owners):
            wanted = present[owners == segment]
            rows = index.row[at[wanted]]
            found = self._read_rows(Location.parse(index.segments[segment]), rows, [keys[i] for i in wanted])
            for position, entry in zip(wanted, found, strict=True):
                entries[position] = entry or entries[position]
        return entries

    def _read_rows(self, location: Location, rows: np.ndarray, keys: list[bytes]) -> list[Entry | None]:
        """The entries at `rows` of a segment; all None when it is damaged."""
        nothing: list[Entry | None] = [None] * len(keys)
        groups = np.unique(rows // ROW_GROUP)
        table = self._read(location, groups=groups.tolist(), gone_is_damage=False)
        if table is None:
            return nothing
        at = np.searchsorted(groups, rows // ROW_GROUP) * ROW_GROUP + rows % ROW_GROUP
        entries = table_entries(table.take(pa.array(at)))
        if [entry.key for entry in entries] != keys:
            self._mark_bad(location, ValueError("a row holds another key than the index says"))
            return nothing
        return list(entries)

    def _read(
        self,
        location: Location,
        *,
        columns: list[str] | None = None,
        groups: list[int] | None = None,
        gone_is_damage: bool = True,
    ) -> pa.Table | None:
        """A segment's table; None for one that is damaged, which is said once."""
        if str(location) in self.bad_segments:
            return None
        try:
            return read_segment(location, self.fingerprint.id, columns=columns, groups=groups)
        except FileNotFoundError:
            if gone_is_damage:
                return None
            raise
        except DAMAGE as exc:
            self._mark_bad(location, exc)
            return None

    def _read_failures(self) -> dict[bytes, Skipped]:
        failures: dict[bytes, Skipped] = {}
        for location, _ in self.folder.join("fail").files():
            table = self._read(location)
            failures |= table_failures(table) if table is not None else {}
        return failures

    def _mark_bad(self, location: Location, exc: Exception) -> None:
        self.bad_segments.add(str(location))
        log.warning("%s: damaged cache segment, passed over: %s", location, exc)

    def _state_fingerprint(self) -> None:
        stated = self.folder.join("fingerprint.json")
        if stated.kind() == "absent":
            stated.write_bytes(self.fingerprint.canonical.encode(), staging=self.folder.join("tmp"))
            return
        with stated.filesystem.open_input_file(stated.path) as file:
            if file.read().decode(errors="replace") != self.fingerprint.canonical:
                raise ArtifactError(f"{stated}: not the fingerprint that the folder's name stands for; move it away")

    def _sweep(self) -> None:
        if not self.folder.is_local:
            return
        for location, _ in self.folder.join("tmp").files():
            if time.time() - os.stat(location.path).st_mtime > STALE_SECONDS:  # noqa: PTH116
                os.unlink(location.path)  # noqa: PTH108
