"""A claim on a folder of an object store: at most one process holds it, and a killed holder's claim lapses.

pyarrow sends no conditional writes (`If-None-Match`), so a claim is an object with a name of its own, and the listing
decides. Who wants the folder writes its claim, lists, and holds the folder only if no other live claim is there; of
two that start together at least one sees the other, and who sees another withdraws. This needs a store that shows
every finished write and deletion in the next listing, as S3, Google Cloud Storage and Azure do. Clocks are never
compared: a claim is dead if its process is known to be dead, or if it stays unchanged while a candidate watches it.

A holder that goes deletes the whole folder, and with it claims that were written just before: a candidate holds the
folder only if its claim is still there a moment later.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchverify.errors import BatchverifyError
from batchverify.storage.location import Location

log = logging.getLogger(__name__)

PREFIX = "claim-"
# A holder renews its claim that often.
BEAT_SECONDS = 10.0
# In beats: a holder that could not renew for so long asks again before it writes; a claim that is unchanged for so
# long is dead. Between the two lies the time for a write that has begun.
LAPSE_BEATS = 4
DEAD_BEATS = 6
# Longer than a store takes to delete what one request names: a released folder with all claims in it.
SETTLE_SECONDS, SETTLE_BEATS = 0.5, 0.05
# Claims that this process makes or holds. One that it could not delete, because the store failed, is dead.
_LIVE: set[str] = set()
# Times that a candidate starts over after meeting another candidate.
ATTEMPTS = 20


class TakenError(Exception):
    """Another process holds the folder; the message says which."""


class Claim:
    """One process's claim on `folder`. Use `held`, or `take` and `release`, and `check` before each write.

    beat: seconds between renewals, which a thread makes. Calls raise OSError if the store fails.
    """

    def __init__(self, folder: Location, *, beat: float = BEAT_SECONDS) -> None:
        self.folder = folder
        self._own = folder.join(PREFIX + uuid.uuid4().hex)
        self._beat, self._beats = beat, 0
        self._renewed = 0.0
        self._lost = False
        self._busy, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, daemon=True, name="claim")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder meanwhile. Raises what `take` raises."""
        self.take()
        try:
            yield
        finally:
            # A claim that cannot be deleted lapses.
            with suppress(OSError):
                self.release()

    def take(self) -> None:
        """Hold the folder from now on. Raises `TakenError` if another process holds it.

        A claim of a process of this machine is judged at once. Another one is watched until it changes or is dead.
        """
        # Before it can be seen: other threads of this process take claims that are not among these for dead.
        _LIVE.add(str(self._own))
        dead: dict[str, bytes] = {}
        try:
            for _ in range(ATTEMPTS):
                for other in self._others():
                    if _read(other) != dead.get(other.path):
                        self._outwait(other, dead)
                if self._settle(dead):
                    self._thread.start()
                    return
                time.sleep(random.uniform(0.05, 0.1 * self._beat))
            raise TakenError("several processes want it at once")
        except BaseException:
            _LIVE.discard(str(self._own))
            raise

    def check(self) -> None:
        """Raise `BatchverifyError` if another process may hold the folder by now."""
        with self._busy:
            if not self._lost and self._has_lapsed():
                self._ask_again()
        if self._lost:
            raise BatchverifyError(
                f"{self.folder}: the store could not be reached for a while, and another run took over; run the same "
                "command again once that one has ended"
            )

    def release(self) -> None:
        """Give the folder up; if nothing else is in it, no trace of it remains."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            with self._busy:
                files: list[str] = []
                # Where the folder cannot be listed, the claim goes nevertheless: others would have to outwait it.
                with suppress(OSError):
                    files = [file.path for file, _ in self.folder.files()]
                if files == [self._own.path]:
                    # pyarrow leaves a marker of the folder when it deletes a file alone.
                    with suppress(FileNotFoundError):
                        self.folder.filesystem.delete_dir(self.folder.path)
                else:
                    self._own.remove()
        finally:
            _LIVE.discard(str(self._own))

    def _settle(self, dead: dict[str, bytes]) -> bool:
        """Write the own claim and see whether all others are dead ones; otherwise withdraw."""
        started = time.monotonic()
        try:
            self._write()
            claims = self._claims()
            others = [claim for claim in claims if claim != self._own]
            # Read after the own claim is there: a holder that comes back to life later sees it and gives up. A live
            # claim that is gone by now may have taken the own one along.
            is_dead = [other.path in dead and _read(other) in (None, dead[other.path]) for other in others]
            if self._own in claims and all(is_dead):
                for other in others:
                    other.remove()
                time.sleep(min(SETTLE_SECONDS, SETTLE_BEATS * self._beat))
                if self._own in self._claims():
                    self._renewed = started
                    return True
        except BaseException:
            with suppress(OSError):
                self._own.remove()
            raise
        self._own.remove()
        return False

    def _outwait(self, other: Location, dead: dict[str, bytes]) -> None:
        """Watch another claim: `TakenError` if it is alive; into `dead`, with its content, if it is not."""
        seen = _read(other)
        if seen is None:
            return
        alive = _is_alive(seen)
        if alive and _parse(seen).get("process") == os.getpid():
            alive = str(other) in _LIVE
        if alive:
            raise TakenError(_describe(seen))
        if alive is None:
            log.warning(
                "%s: waiting up to %.0f s to see whether the run that holds it (%s) still lives",
                self.folder, DEAD_BEATS * self._beat, _describe(seen),
            )  # fmt: skip
            deadline = time.monotonic() + DEAD_BEATS * self._beat
            while time.monotonic() < deadline:
                time.sleep(self._beat / 10)
                now = _read(other)
                if now is None:
                    return
                if now != seen:
                    raise TakenError(_describe(now))
        dead[other.path] = seen

    def _renew_regularly(self) -> None:
        while not self._stop.wait(self._beat):
            # After an outage the next beat, or `check`, tries again.
            with suppress(OSError), self._busy:
                if self._lost:
                    return
                self._renew()

    def _renew(self) -> None:
        if self._has_lapsed():
            self._ask_again()
            return
        started = time.monotonic()
        if self._own not in self._claims():
            self._lost = True
            return
        self._write()
        self._renewed = started

    def _ask_again(self) -> None:
        """Renew a claim that others may have found dead: it is lost if it is gone or not the only one."""
        started = time.monotonic()
        if self._own in self._claims():
            self._write()
            if self._claims() == [self._own]:
                self._renewed = started
                return
        self._lost = True
        self._own.remove()

    def _has_lapsed(self) -> bool:
        return time.monotonic() - self._renewed > LAPSE_BEATS * self._beat

    def _claims(self) -> list[Location]:
        return [file for file, _ in self.folder.files() if file.name.startswith(PREFIX)]

    def _others(self) -> list[Location]:
        return [claim for claim in self._claims() if claim != self._own]

    def _write(self) -> None:
        self._beats += 1
        document = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "beat": self._beats,
        }
        self._own.write_bytes(json.dumps(document).encode())


def _read(claim: Location) -> bytes | None:
    """The content of a claim; None if it is gone."""
    try:
        return claim.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _describe(content: bytes) -> str:
    document = _parse(content)
    return f"process {document.get('process', '?')} on {document.get('host', '?')}"


def _is_alive(content: bytes) -> bool | None:
    """Whether the process that wrote a claim lives; None if it cannot be seen from here."""
    document = _parse(content)
    machine, process = document.get("machine"), document.get("process")
    if not machine or machine != _machine() or not isinstance(process, int):
        return None
    started = _started(process)
    return bool(started) and started == document.get("started")


def _machine() -> str:
    """What tells this start of this machine, and this set of process numbers, from all others; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process started, in the kernel's ticks; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]
