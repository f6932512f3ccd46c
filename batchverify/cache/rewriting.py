"""Segments written anew, without some of their rows or several in one, while other processes read and write.

The new segment is there before the old ones are deleted, so that a kill at any moment loses nothing: at worst a row
is there twice. One process at a time rewrites the segments of a fingerprint.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.cache.folders import (
    KINDS,
    LOCK,
    QUARANTINE,
    FingerprintFolder,
    StoredSegment,
    bad_vectors,
    find_folders,
    one_line,
    read_folder,
    system_error,
)
from batchverify.cache.segment import (
    DAMAGE,
    compute_path_of,
    has_details,
    key_bytes,
    read_segment,
    with_details,
    write_segment,
)
from batchverify.errors import ArtifactError, UsageError
from batchverify.storage.claim import Claim, TakenError
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_denied, is_transient

log = logging.getLogger(__name__)

# Rows of a merged segment, 72 MB of vectors; segments of fewer than half are merged.
FULL_ROWS = 65_536
# A temporary file that nobody has written to for so many seconds is a killed writer's.
WRITING_SECONDS = 60.0


@dataclass
class Erasure:
    """What `erase` did.

    found: keys that had rows. vectors, failures: rows erased. rewritten: segments written anew without them. deleted:
    segments and other files deleted whole. unsearched: damaged files that are left, with the reason.
    """

    found: set[bytes] = field(default_factory=set)
    vectors: int = 0
    failures: int = 0
    rewritten: int = 0
    deleted: int = 0
    unsearched: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For `--json`; keys in hex."""
        return asdict(self) | {"found": sorted(key.hex() for key in self.found)}


@dataclass
class Compaction:
    """What `compact` did. merged: segments that are now part of `written` new ones. duplicates: rows dropped.

    before, after: number of segments. damaged: segments that are left as they are, with the reason.
    """

    before: int = 0
    after: int = 0
    merged: int = 0
    written: int = 0
    duplicates: int = 0
    damaged: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(f"{path}: left as it is: {what}" for path, what in self.damaged.items()),
            f"{self.before:,} segments are now {self.after:,}; {self.duplicates:,} rows were there twice",
        ]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def erase(
    root: str | Location,
    keys: Collection[bytes],
    *,
    delete_damaged: bool = False,
    writing_seconds: float = WRITING_SECONDS,
) -> Erasure:
    """Delete all rows of 32-byte `keys` from a cache, under every fingerprint, with their bytes.

    Temporary files of killed writers are deleted, and so are quarantined segments that hold a key. Waits for
    temporary files that are in use, up to `writing_seconds`. delete_damaged: also delete damaged files, in which keys
    cannot be searched. Raises `UsageError` if another process rewrites the cache, `ArtifactError` if the cache cannot
    be listed or written.
    """
    erasure = Erasure()
    for location in _fingerprints(root):
        with _alone(location) as check:
            _delete_temporary(location.join("tmp"), writing_seconds, erasure)
            wanted = pa.array(sorted(keys), pa.binary(32))
            _Eraser(_Rewriter(location, check), wanted, delete_damaged, erasure).run()
    return erasure


def compact(root: str | Location, *, full_rows: int = FULL_ROWS) -> Compaction:
    """Merge small segments of a cache into larger ones and drop rows that are there twice. Reads stay the same.

    full_rows: the most rows of a merged segment. Raises what `erase` raises.
    """
    compaction = Compaction()
    for location in _fingerprints(root):
        with _alone(location) as check:
            for kind in KINDS:
                compaction.before += len(_segments(location, kind))
                _Compactor(_Rewriter(location, check), kind, full_rows, compaction).run()
                compaction.after += len(_segments(location, kind))
    return compaction


def _fingerprints(root: str | Location) -> list[Location]:
    return [folder.location for folder in find_folders(Location.parse(str(root)))[0]]


def _segments(location: Location, kind: str) -> list[StoredSegment]:
    return [segment for segment in read_folder(location).segments if segment.kind == kind]


@contextmanager
def _alone(location: Location) -> Iterator[Callable[[], None]]:
    """Be the only process that rewrites the folder of a fingerprint; errors of writing become `ArtifactError`.

    Yields what has to be called before each change: it raises if that is no longer so.
    """
    busy = f"{location}: another `cache forget` or `cache compact` is at work on it"
    lock = location.join(LOCK)
    try:
        with _locked(lock, busy) if location.is_local else _claimed(lock, busy) as check:
            yield check
    except OSError as exc:
        raise ArtifactError(f"{location}: the cache cannot be rewritten: {exc}") from exc


@contextmanager
def _locked(file: Location, busy: str) -> Iterator[Callable[[], None]]:
    descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise UsageError(busy) from exc
        except OSError as exc:
            log.warning("%s: cannot be locked (%s); do not rewrite a cache from two processes at once", file, exc)
        yield lambda: None
    finally:
        os.close(descriptor)


@contextmanager
def _claimed(folder: Location, busy: str) -> Iterator[Callable[[], None]]:
    claim = Claim(folder)
    try:
        with claim.held():
            yield claim.check
    except TakenError as exc:
        raise UsageError(f"{busy} ({exc})") from exc


def _delete_temporary(folder: Location, seconds: float, erasure: Erasure) -> None:
    """Delete the temporary files of killed writers; wait for those of others, which become segments."""
    if not folder.is_local:
        return
    for file, _ in folder.files():
        with suppress(FileNotFoundError):
            while (age := time.time() - Path(file.path).stat().st_mtime) < seconds:
                time.sleep(min(0.1, max(seconds - age, 0.01)))
            file.remove()
            erasure.deleted += 1


@dataclass(frozen=True)
class _Rewriter:
    """Reads and replaces segments of one fingerprint. check: called before each change."""

    location: Location
    check: Callable[[], None]

    @staticmethod
    def read(
        folder: FingerprintFolder, segment: StoredSegment, columns: list[str] | None = None
    ) -> pa.Table | Exception:
        """As `FingerprintFolder.read`; `ArtifactError` if the store failed, which says nothing about the segment."""
        table = folder.read(segment, columns)
        if isinstance(table, Exception) and (is_transient(table) or is_denied(table)):
            raise ArtifactError(f"{segment.location}: cannot be read: {one_line(table)}") from table
        return table

    def remove(self, segment: StoredSegment) -> None:
        """Delete a segment."""
        self.check()
        segment.location.remove()

    def replace(self, folder: FingerprintFolder, old: Sequence[StoredSegment], table: pa.Table) -> None:
        """Write a segment with the rows that stay, read it back, then delete those of one kind that it replaces."""
        if table.num_rows:
            self._write(folder, old, table)
        for segment in old:
            self.remove(segment)

    def _write(self, folder: FingerprintFolder, old: Sequence[StoredSegment], table: pa.Table) -> None:
        kind = old[0].kind
        # The name's time decides which of several rows of a key counts. Of vectors the first one does, of failures
        # the last one: the new segment must come before, or after, all rows that those of the old ones beat.
        choose: Callable[..., int] = min if kind == "data" else max
        self.check()
        new = write_segment(
            folder.location.join(kind),
            table,
            folder.location.join("tmp"),
            fingerprint=folder.id,
            compute_path=compute_path_of(table),
            written=choose(segment.name.written for segment in old),
        )
        try:
            intact = key_bytes(read_segment(new, folder.id, folder.schema(kind))) == key_bytes(table)
        except DAMAGE as exc:
            raise ArtifactError(f"{new}: cannot be read after it was written: {one_line(exc)}") from exc
        if not intact:
            raise ArtifactError(f"{new}: holds other keys than were written")


@dataclass(frozen=True)
class _Eraser:
    """Erases the rows of `keys` (binary(32)) from the segments of one fingerprint."""

    rewriter: _Rewriter
    keys: pa.Array
    delete_damaged: bool
    erasure: Erasure

    def run(self) -> None:
        """Go on until no segment is new: writers commit meanwhile."""
        seen: set[str] = set()
        while True:
            folder = read_folder(self.rewriter.location)
            segments = [*folder.segments, *folder.quarantined]
            new = [segment for segment in segments if segment.location.path not in seen]
            if not new:
                return
            for segment in new:
                seen.add(segment.location.path)
                with suppress(FileNotFoundError):
                    self._search(folder, segment)

    def _search(self, folder: FingerprintFolder, segment: StoredSegment) -> None:
        table = self.rewriter.read(folder, segment, ["key"])
        if not isinstance(table, Exception):
            if not pc.any(self._hit(table)).as_py():
                return
            table = self.rewriter.read(folder, segment)
        if not isinstance(table, Exception):
            self._erase(folder, segment, table)
        elif self.delete_damaged and not system_error(table):
            self.rewriter.remove(segment)
            self.erasure.deleted += 1
        else:
            self.erasure.unsearched[str(segment.location)] = one_line(table)

    def _hit(self, table: pa.Table) -> pa.ChunkedArray:
        return pc.is_in(table.column("key"), value_set=self.keys)

    def _erase(self, folder: FingerprintFolder, segment: StoredSegment, table: pa.Table) -> None:
        hit = self._hit(table)
        gone, left = table.filter(hit), table.filter(pc.invert(hit))
        if segment.kind == QUARANTINE or not left.num_rows:
            self.rewriter.remove(segment)
            self.erasure.deleted += 1
        else:
            self.rewriter.replace(folder, [segment], left)
            self.erasure.rewritten += 1
        self.erasure.found |= set(gone.column("key").to_pylist())
        if "embedding" in table.column_names:
            self.erasure.vectors += gone.num_rows
        else:
            self.erasure.failures += gone.num_rows


@dataclass(frozen=True)
class _Keys:
    """A segment with its (N,) S32 keys.

    details: (N,) bool, the rows whose details are known. stays: (N,) bool, the rows that no other row of their key
    beats. rival: whether a key has several rows. second: whether a row stays beside an earlier one of its key, which
    has no details.
    """

    segment: StoredSegment
    compute_path: str
    keys: np.ndarray
    details: np.ndarray
    stays: np.ndarray
    rival: bool = False
    second: bool = False


@dataclass(frozen=True)
class _Compactor:
    """Merges the segments of one fingerprint and one kind."""

    rewriter: _Rewriter
    kind: str
    full_rows: int
    compaction: Compaction

    def run(self) -> None:
        """Merge segments of one compute path each: a segment's footer states only one."""
        folder = read_folder(self.rewriter.location)
        groups: dict[str, list[_Keys]] = {}
        for each in self._sound(folder):
            # Merged, it might come before the segment with the earlier rows.
            if each.second:
                continue
            if self._is_small(each) or not each.stays.all():
                groups.setdefault(each.compute_path, []).append(each)
        for group in groups.values():
            for bundle in self._bundles(group):
                if len(bundle) > 1 or not bundle[0].stays.all():
                    self._merge(folder, bundle)

    def _is_small(self, each: _Keys) -> bool:
        return len(each.keys) < self.full_rows // 2

    def _sound(self, folder: FingerprintFolder) -> list[_Keys]:
        """The segments that may be trusted; those that are rewritten, or beat rows of others, are read whole."""
        known = self._read_keys(folder)
        checked: set[str] = set()
        while True:
            decided = self._decide(known)
            doubtful = [
                each
                for each in decided
                if (self._is_small(each) or each.rival) and each.segment.location.path not in checked
            ]
            if not doubtful:
                return decided
            for each in doubtful:
                checked.add(each.segment.location.path)
            damaged = {each.segment for each in doubtful if not self._is_whole(folder, each.segment)}
            known = [each for each in known if each.segment not in damaged]

    def _read_keys(self, folder: FingerprintFolder) -> list[_Keys]:
        found = []
        for segment in folder.segments:
            if segment.kind != self.kind:
                continue
            with suppress(FileNotFoundError):
                columns = ["key", "sharpness"] if self.kind == "data" else ["key"]
                table = self.rewriter.read(folder, segment, columns)
                if isinstance(table, Exception):
                    self.compaction.damaged[str(segment.location)] = one_line(table)
                    continue
                keys = np.frombuffer(key_bytes(table), "S32")
                stays = np.ones(len(keys), np.bool_)
                found.append(_Keys(segment, compute_path_of(table), keys, has_details(table), stays))
        return found

    def _is_whole(self, folder: FingerprintFolder, segment: StoredSegment) -> bool:
        try:
            table = self.rewriter.read(folder, segment)
        except FileNotFoundError:
            return False
        error = table if isinstance(table, Exception) else bad_vectors(table)
        if error is not None:
            self.compaction.damaged[str(segment.location)] = one_line(error)
        return error is None

    def _decide(self, known: Sequence[_Keys]) -> list[_Keys]:
        """Which rows stay: of vectors the first one of a key, of failures the last one, as readers have it.

        The first row of a key with details stays, too: runs with `--details` read that one.
        """
        every = np.concatenate([np.zeros(0, "S32"), *(each.keys for each in known)])
        turn = slice(None) if self.kind == "data" else slice(None, None, -1)
        _, first, group, count = np.unique(every[turn], return_index=True, return_inverse=True, return_counts=True)
        stays, second = np.zeros((2, len(every)), np.bool_)
        stays[first] = True
        detailed = np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *(each.details for each in known)]))
        second[detailed[np.unique(every[detailed], return_index=True)[1]]] = True
        second &= ~stays
        stays |= second
        borders = np.cumsum([len(each.keys) for each in known])[:-1]
        split = zip(*(np.split(rows[turn], borders) for rows in (stays, count[group] > 1, second)), strict=True)
        return [
            replace(each, stays=stay, rival=bool(repeats.any()), second=bool(late.any()))
            for each, (stay, repeats, late) in zip(known, split, strict=False)
        ]

    def _bundles(self, group: Sequence[_Keys]) -> Iterator[list[_Keys]]:
        """Segments to be merged into one each: as many as give at most `full_rows` rows."""
        bundle: list[_Keys] = []
        rows = 0
        for each in group:
            more = int(each.stays.sum())
            if bundle and rows + more > self.full_rows:
                yield bundle
                bundle, rows = [], 0
            bundle.append(each)
            rows += more
        if bundle:
            yield bundle

    def _merge(self, folder: FingerprintFolder, bundle: Sequence[_Keys]) -> None:
        parts = []
        for each in bundle:
            table = self.rewriter.read(folder, each.segment)
            if isinstance(table, Exception):
                raise ArtifactError(f"{each.segment.location}: {one_line(table)}")
            table = with_details(table) if self.kind == "data" else table
            parts.append(table.filter(pa.array(each.stays)))
        table = pa.concat_tables(parts)
        self.rewriter.replace(folder, [each.segment for each in bundle], table)
        self.compaction.merged += len(bundle)
        self.compaction.written += table.num_rows > 0
        self.compaction.duplicates += sum(int((~each.stays).sum()) for each in bundle)
