"""The address of a Ray cluster: who named it, and whether a Ray answers there.

Ray itself waits for minutes for a cluster that is gone, says nothing, and hears neither Ctrl-C nor SIGTERM meanwhile.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from batchverify.errors import BatchverifyError, UsageError

VARIABLE = "RAY_ADDRESS"
# Set in the processes of a job that Ray's job server started.
JOB_VARIABLE = "RAY_JOB_ID"
OPTION = "--address"
# How long a name server and a cluster may take to answer.
ANSWER_SECONDS = 10.0
PROCESSES = Path("/proc")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")
# What starts an HTTP/2 connection, which gRPC uses: a fixed text and an empty SETTINGS frame. The other side answers
# with a SETTINGS frame, whose type is its fourth byte.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS_START = b"\4"


@dataclass(frozen=True)
class Address:
    """Where a cluster is. text: `auto` (the cluster of this machine) or `HOST:PORT`. source: what named it."""

    text: str
    source: str = OPTION

    @classmethod
    def find(cls, given: str | None) -> Address | None:
        """The cluster that `--address` or `$RAY_ADDRESS` names, or whose job this process is; None for none.

        As in Ray, the variable completes `auto`, and there `local` means a Ray of its own.
        """
        named = os.environ.get(VARIABLE)
        if given is not None and (given != "auto" or named in (None, "", "auto", "local")):
            return cls(given)
        if named:
            return cls(named, f"${VARIABLE}") if named != "local" else None
        return cls("auto", f"${JOB_VARIABLE}") if os.environ.get(JOB_VARIABLE) else None

    def require_answer(self, seconds: float = ANSWER_SECONDS, processes: Path = PROCESSES) -> None:
        """Raise `BatchverifyError` unless a Ray answers within so many seconds, `UsageError` for no address.

        `auto` is checked as far as Ray has written down which cluster that is. processes: the folder that lists them.
        """
        if self.text.startswith("ray://"):
            raise UsageError(
                f"{self}: Ray Client breaks long jobs; hand the command to the cluster instead: "
                "batchverify submit --address http://HEAD:8265 -- …"
            )
        if self.text != "auto":
            _require_answer(self.text, str(self), seconds)
            return
        file = current_cluster()
        with suppress(OSError):
            written = file.read_text(encoding="utf8").strip()
            # Ray prefers a node of this machine that runs to what it has written down.
            if not _runs("raylet", processes):
                advice = "if that cluster is gone, `ray stop` forgets it"
                _require_answer(written, f"{self}: {written} (from {file}; {advice})", seconds)

    def __str__(self) -> str:
        return f"{self.source} {self.text}"


def current_cluster() -> Path:
    """The file in which `ray start` leaves the address of this machine's cluster."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  Ray's default
    return Path(folder, "ray", "ray_current_cluster")


def _runs(name: str, processes: Path) -> bool:
    """Whether a process of this name runs, as far as Linux tells."""
    for file in processes.glob("[0-9]*/comm"):
        with suppress(OSError):
            if file.read_text(encoding="utf8", errors="replace").strip() == name:
                return True
    return False


def _require_answer(text: str, named: str, seconds: float) -> None:
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 1 << 16:
        raise UsageError(f"{named}: a cluster's address is auto or HOST:PORT, such as 10.0.0.1:6379")
    host, port = match["host"].strip("[]"), int(match["port"])
    problem = problem_within(seconds, lambda: _greet(host, port, seconds))
    if problem:
        raise BatchverifyError(f"{named}: no Ray cluster answers there: {problem}")


def problem_within(seconds: float, call: Callable[[], object]) -> str:
    """Why a call failed or took too long; empty if it did not.

    The call goes on in a thread: looking up a name can take a minute, and signals are not heard meanwhile.
    """
    outcome: SimpleQueue[str] = SimpleQueue()

    def run() -> None:
        try:
            call()
            outcome.put("")
        except (OSError, UnicodeError) as exc:
            outcome.put(getattr(exc, "strerror", None) or str(exc))

    Thread(target=run, name="address", daemon=True).start()
    try:
        return outcome.get(timeout=seconds)
    except Empty:
        return f"nothing came within {seconds:g} seconds"


def _greet(host: str, port: int, seconds: float) -> None:
    """Connect, and see whether the other side speaks as Ray does. Raises OSError, also for a name that is unknown."""
    with socket.create_connection((host, port), timeout=seconds) as connection:
        # A cluster with TLS says nothing before the handshake.
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(_GREETING)
        with connection.makefile("rb") as answers:
            if answers.read(4)[3:] != _SETTINGS_START:
                raise ConnectionError("another program does (Ray's usual port is 6379; 8265 is for `submit`)")
