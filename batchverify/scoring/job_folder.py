"""The job folder `OUT.job/` beside an output: which job is at work on it, and that no other run is."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchverify.errors import UsageError
from batchverify.fingerprint import flattened
from batchverify.storage.location import Location

log = logging.getLogger(__name__)

STATE = "job.json"
LOCK = "lock"
_TEMPORARY = re.compile(r"^\..*\.tmp$")
_OURS = re.compile(r"^(job\.json|lock|part-\d{5,}\.parquet|\..*\.tmp)$")
# A folder that is taken away while it is claimed is claimed anew; more than twice in a row is no accident.
_CLAIMS = 10
# Differences that are named.
SHOWN = 5


class JobFolder:
    """`OUT.job/`: kept after a kill, Ctrl-C or a failure, gone after success.

    Its `job.json` holds `job` (the document of everything that moves a row), `token` (of this attempt at
    it, in every part file too) and, once vectors were computed, `compute_path`.
    """

    def __init__(self, output: Location) -> None:
        self.output = output
        self.location = Location(f"{output.path}.job", output.scheme, output.query)

    def state(self) -> dict[str, Any] | None:
        """What `job.json` holds; None without one. `UsageError` for one that is not ours."""
        place = self.location.join(STATE)
        try:
            state = json.loads(place.read_bytes())
            if {"job", "token"} <= state.keys() and isinstance(state["job"], dict):
                return dict(state)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, AttributeError):
            pass
        raise UsageError(
            f"{place}: not written by batchverify, or damaged; give another output with -o, or delete it"
        )

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write `job.json`."""
        self.location.join(STATE).write_bytes(json.dumps(state, indent=1, sort_keys=True).encode())

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder; `UsageError` while another run does. Object stores have no lock.

        The kernel releases the lock however the process ends. A folder without a `job.json` is taken away
        at the end.
        """
        descriptor = self._lock() if self.location.is_local else None
        try:
            self.sweep(everything=self.state() is None)
            yield
        finally:
            try:
                # An error here would hide that of the run; what is left is swept by the next.
                with suppress(OSError, UsageError):
                    if self.state() is None:
                        self.remove()
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def sweep(self, *, everything: bool = True) -> None:
        """Take away what stands in it, or the temporary files alone; never the lock and files of others."""
        # The state first: parts without it are debris, never taken for a job half done.
        names = sorted((each for each, _ in self._files()), key=lambda each: each.name != STATE)
        for each in names:
            ours = _OURS.match(each.name) if everything else _TEMPORARY.match(each.name)
            if ours and each.name != LOCK:
                with suppress(FileNotFoundError):
                    each.filesystem.delete_file(each.path)

    def remove(self) -> None:
        """Take the folder away; files of others in it stay."""
        self.sweep()
        if self.location.is_local:
            with suppress(OSError):
                Path(self.location.path, LOCK).unlink()
                Path(self.location.path).rmdir()
        elif not self._files():
            # What deleting leaves of a folder there: an empty marker.
            with suppress(OSError):
                self.location.filesystem.delete_dir(self.location.path)

    def _files(self) -> list[tuple[Location, int]]:
        return self.location.files()

    def _lock(self) -> int:
        folder = Path(self.location.path)
        for _ in range(_CLAIMS):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                if self._take(descriptor, folder / LOCK):
                    return descriptor
        raise UsageError(f"{folder}: vanishes again and again; is another program at work there?")

    def _take(self, descriptor: int, path: Path) -> bool:
        """Lock an open file; closed again, unless it is locked and still has its name."""
        taken = False
        try:
            self._flock(descriptor)
            # Where not, the run before ended and took the folder away between opening and locking.
            taken = _is_named(descriptor, path)
        finally:
            if not taken:
                os.close(descriptor)
        if taken:
            # Who holds it is said in a message alone: a full disk is found out by what is written next.
            with suppress(OSError):
                os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}".encode(), 0)
        return taken

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            host, _, process = os.pread(descriptor, 200, 0).decode(errors="replace").partition(" ")
            raise UsageError(
                f"{self.output}: another run is at work on this output (process {process} on {host}): wait for "
                "it, stop it, or give another output"
            ) from exc
        except OSError as exc:
            log.warning("%s: cannot be locked (%s); do not run two jobs on it at once", self.location, exc)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    mine, named = os.fstat(descriptor), path.stat()
    return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two job documents, for people: `threshold: 0.4 there, 0.5 here; …`."""
    old, new = flattened(there), flattened(here)
    found = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name in ("manifest", "head", "embedding.backbone"):
            found.append(f"{name}: another content")
        else:
            found.append(f"{name}: {old.get(name)} there, {new.get(name)} here")
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more
