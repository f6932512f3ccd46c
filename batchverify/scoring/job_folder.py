"""The job folder `OUT.job/` beside an output: the state of the job and the lock against a second run."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, cast

from batchverify.documents import MOST_RECORD, read_document
from batchverify.errors import BatchverifyError, UsageError
from batchverify.fingerprint import differing
from batchverify.storage.claim import Claim, TakenError
from batchverify.storage.location import Location
from batchverify.storage.temporary import is_named

log = logging.getLogger(__name__)

STATE = "job.json"
LOCK = "lock"
_TEMPORARY = re.compile(r"^\..*\.tmp$")
_OURS = re.compile(r"^(job\.json|lock|part-\d{5,}\.parquet|\..*\.tmp)$")
# Tries to lock a folder that another run removes at the same moment.
_CLAIMS = 10
# Differences that a message lists.
SHOWN = 5


class _JobState(TypedDict):
    job: dict[str, Any]
    token: str


class JobState(_JobState, total=False):
    """The content of `job.json`.

    job: the document of everything that affects a row. token: of this attempt, also in every part file.
    part_rows: rows of a part. compute_path: of the vectors, once any have been computed. prior: the estimate of
    `--prior estimate`.
    """

    part_rows: int
    compute_path: str
    prior: dict[str, Any]


class JobFolder:
    """`OUT.job/` with its `job.json`: kept after a kill, Ctrl-C or a failure, removed after success."""

    def __init__(self, output: Location) -> None:
        self.output = output
        self.location = Location(f"{output.path}.job", output.scheme, output.query)
        self._claim: Claim | None = None

    def state(self) -> JobState | None:
        """The content of `job.json`; None if there is none.

        Raises `UsageError` for a foreign or damaged one, `BatchverifyError` for one that cannot be read.
        """
        path = self.location.join(STATE)
        try:
            state = read_document(path.read_bytes(MOST_RECORD), MOST_RECORD)
            if _is_state(state):
                return cast(JobState, state)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise BatchverifyError(f"{path}: cannot be read: {exc}") from exc
        except ValueError:
            pass
        raise UsageError(f"{path}: not written by batchverify, or damaged; give another output with -o, or delete it")

    def write_state(self, state: JobState) -> None:
        """Write `job.json`."""
        self.check()
        self.location.join(STATE).write_bytes(json.dumps(state, indent=1, sort_keys=True).encode())

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder; `UsageError` if another run holds it.

        A folder without a `job.json` is removed at the end. On a disk it is a lock that the kernel releases however
        the process ends, in an object store a `Claim`.
        """
        with ExitStack() as stack:
            if self.location.is_local:
                stack.callback(os.close, self._lock())
            else:
                stack.enter_context(self._held())
            try:
                self.sweep(everything=self.state() is None)
                yield
            finally:
                # An error here would hide that of the run. The next run removes what is left.
                with suppress(OSError, BatchverifyError):
                    if self.state() is None:
                        self.remove()

    def check(self) -> None:
        """Raise `BatchverifyError` if another run may hold the folder by now; only in object stores."""
        if self._claim is not None:
            self._claim.check()

    def sweep(self, *, everything: bool = True) -> None:
        """Remove all files of the job, or only temporary ones; never the lock, never files of others."""
        self.check()
        # The state goes first: without it, parts that are left are not taken for a job half done.
        files = sorted((file for file, _ in self.location.files()), key=lambda file: file.name != STATE)
        for file in files:
            is_ours = _OURS.match(file.name) if everything else _TEMPORARY.match(file.name)
            if is_ours and file.name != LOCK:
                with suppress(FileNotFoundError):
                    file.filesystem.delete_file(file.path)

    def remove(self) -> None:
        """Remove the folder, which must be held; files of others in it stay."""
        self.sweep()
        if self.location.is_local:
            with suppress(OSError):
                Path(self.location.path, LOCK).unlink()
        self.remove_empty()

    @contextmanager
    def _held(self) -> Iterator[None]:
        claim = Claim(self.location)
        try:
            with claim.held():
                self._claim = claim
                yield
        except TakenError as exc:
            raise self._taken(str(exc)) from exc
        finally:
            self._claim = None

    def _taken(self, by: str) -> UsageError:
        return UsageError(
            f"{self.output}: another run is writing this output ({by}): wait for it, stop it, or give another output"
        )

    def remove_empty(self) -> None:
        """Remove the folder if nothing is in it, not even a lock. In an object store it is an empty marker."""
        with suppress(OSError):
            if self.location.is_local:
                Path(self.location.path).rmdir()
            elif self.location.kind() == "folder" and not self.location.files():
                self.location.filesystem.delete_dir(self.location.path)

    def _lock(self) -> int:
        folder = Path(self.location.path)
        for _ in range(_CLAIMS):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                if self._take(descriptor, folder / LOCK):
                    return descriptor
        raise UsageError(f"{folder}: disappears again and again; does another program remove it?")

    def _take(self, descriptor: int, path: Path) -> bool:
        """Lock an open file. Close it again if that fails or the file no longer has its name."""
        taken = False
        try:
            self._flock(descriptor)
            # The file loses its name if the previous run ends and removes the folder before this one locks it.
            taken = is_named(descriptor, path)
        finally:
            if not taken:
                os.close(descriptor)
        if taken:
            # For the message alone: a full disk shows up in what is written next.
            with suppress(OSError):
                os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}".encode(), 0)
        return taken

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            host, _, process = os.pread(descriptor, 200, 0).decode(errors="replace").partition(" ")
            raise self._taken(f"process {process} on {host}") from exc
        except OSError as exc:
            log.warning("%s: cannot be locked (%s); do not run two jobs with this output at once", self.location, exc)


def _is_state(value: Any) -> bool:
    """Whether a JSON value has the types of a `JobState`."""
    if not isinstance(value, dict):
        return False
    rows = value.get("part_rows", 1)
    texts = isinstance(value.get("token"), str) and isinstance(value.get("compute_path", ""), str)
    prior = value.get("prior", {"share": 0.5})
    if not isinstance(prior, dict) or not isinstance(prior.get("share"), float):
        return False
    return texts and isinstance(value.get("job"), dict) and isinstance(rows, int) and rows >= 1


def shown_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The differences of two job documents, for people: `threshold: 0.4 there, 0.5 here; …`."""
    hashes = ("manifest", "head", "embedding.backbone")
    texts = [
        f"{name}: " + ("different content" if name in hashes else f"{old} there, {new} here")
        for name, old, new in differing(there, here)
    ]
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
