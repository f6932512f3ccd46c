"""Ray's start: joining a cluster, or starting a Ray on this machine in a folder whose sockets have short paths."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchverify.engine.ray.address import VARIABLE, Address, problem_within
from batchverify.errors import BatchverifyError, UsageError
from batchverify.process import require_own_process
from batchverify.runtime.devices import available_cpus

# Names Ray's folder; without it Ray takes $TMPDIR.
FOLDER_VARIABLE = "RAY_TMPDIR"
# How long a Ray that runs may take to list its nodes.
RUNNING_SECONDS = 30.0
# Bytes of the longest path of a socket, and those that Ray puts behind its folder.
LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
SOCKET_BYTES = len("/ray/session_2026-11-28_12-34-56_123456_4194304/sockets/plasma_store")
SHORT_FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108  Ray's own default, and the other one of POSIX systems


def start_ray(address: Address | None, num_cpus: int | None, verbose: bool) -> None:
    """Join the cluster at `address`, or start a Ray here. Raises `UsageError` and `BatchverifyError`."""
    if address is not None:
        if num_cpus is not None:
            raise UsageError(
                f"--num-cpus is for a local Ray; the cluster of {address} has its own number of CPUs: omit the option"
                + (f", or unset {VARIABLE}" if address.source == f"${VARIABLE}" else "")
            )
        address.require_answer()
    require_own_process("Ray")
    import ray

    if not verbose:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "1")
        logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
        "configure_logging": True,
    }
    if address is None:
        # On this machine workers at nice 15, Ray's default, would wait for all other processes.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"address": "local", "num_cpus": num_cpus or available_cpus(), "include_dashboard": False}
        choose_folder()
        _spare_home()
    else:
        options["address"] = address.text
    if sys.stderr is None:
        # Ray's handler of faults needs one, for as long as the process lives.
        sys.stderr = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if on_main_thread:
            # Ray replaces it by a handler that ends the process without our clean-up.
            signal.signal(signal.SIGTERM, handler)
    except (OSError, RuntimeError, ValueError) as exc:
        raise BatchverifyError(_sentence(address, exc)) from exc


@contextmanager
def running_ray(address: str | None, num_cpus: int | None, verbose: bool) -> Iterator[None]:
    """The Ray that this process has joined, or else one that is joined or started, and left at the end."""
    import ray

    if ray.is_initialized():
        require_running()
        yield
        return
    start_ray(Address.find(address), num_cpus, verbose)
    try:
        yield
    finally:
        ray.shutdown()


def require_running() -> None:
    """Raise `BatchverifyError` if the Ray that this process joined before does not answer.

    Its cluster may be gone, or the process was forked from the one that joined it.
    """
    import ray

    if problem := problem_within(RUNNING_SECONDS, ray.nodes):
        raise BatchverifyError(
            f"Ray is initialised in this process but does not answer ({problem}): call ray.shutdown(), and start "
            "processes with multiprocessing.get_context('spawn')"
        )


def choose_folder() -> None:
    """Give a local Ray a short, writable folder by `$RAY_TMPDIR`, if `$TMPDIR` is none. Raises `UsageError` for none.

    Batch systems set TMPDIR to long folders, in which Ray cannot make sockets.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named is not None:
        if problem := _problem_of(named):
            raise UsageError(f"{FOLDER_VARIABLE}={named}: {problem}; Ray needs another folder for its sockets")
        return
    temporary = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    problem = _problem_of(temporary or SHORT_FOLDERS[0])
    if not problem:
        return
    for folder in SHORT_FOLDERS:
        if not _problem_of(folder):
            os.environ[FOLDER_VARIABLE] = folder
            return
    raise UsageError(
        f"TMPDIR={temporary or ''}: {problem}, and neither {' nor '.join(SHORT_FOLDERS)} serves Ray for its sockets: "
        f"set {FOLDER_VARIABLE} to a short folder that can be written to, or use --engine local"
    )


def _spare_home() -> None:
    """Give a local Ray a token by the environment where there is no home, in which Ray would keep one."""
    home = os.path.expanduser("~")  # noqa: PTH111
    if not os.path.isabs(home) and not os.environ.get("RAY_AUTH_TOKEN_PATH"):  # noqa: PTH117
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _problem_of(folder: str) -> str:
    """Why Ray cannot keep its sockets in a folder; empty if it can."""
    most = LONGEST_SOCKET - SOCKET_BYTES
    if not os.path.isabs(folder):  # noqa: PTH117
        return "the path is not absolute"
    if len(os.fsencode(folder)) > most:
        return f"the path has more than {most} bytes"
    own = Path(folder, "ray")
    try:
        # As Ray does. A folder of this name that another user made is of no use.
        own.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        return f"the folder cannot be made: {exc.strerror}"
    return "" if os.access(own, os.W_OK | os.X_OK) else "the folder cannot be written to"


def _sentence(address: Address | None, exc: Exception) -> str:
    if address is None:
        where = f"; its folder is ${FOLDER_VARIABLE} or $TMPDIR" if isinstance(exc, OSError) else ""
        return f"Ray could not be started (local): {exc}{where}"
    hint = "for a cluster with token authentication set RAY_AUTH_MODE=token"
    return f"Ray could not be reached ({address}): {exc}; {hint}"
