"""The same command as a job on a Ray cluster, through the cluster's job server: submit, follow, ask, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import batchverify
from batchverify.errors import BatchverifyError, UsageError
from batchverify.storage.location import scheme_of

# Ray gives a stopped job 3 seconds; ours finishes what is being embedded and commits it.
STOP_SECONDS = 60
STOPPED = 130
# Contact lost for so long ends the following; the job goes on.
LOST_SECONDS = 300.0
RETRY_SECONDS = 2.0
PAUSE_SECONDS = 0.2
# Arguments of our commands that are paths: what is read, and what is written.
READ = ("manifest", "train", "dev", "test", "scores", "image_root", "head", "weights", "backbone")
WRITTEN = ("output", "cache", "tensorboard")
GLOB = frozenset("*?[")
# What tells a backbone's file from its name.
WEIGHTS = (".pt", ".safetensors")


@dataclass(frozen=True)
class Submission:
    """A command for the cluster.

    command: as after `batchverify`. env: names of variables that take their values from here. working_dir: a
    folder that goes along and in which the command runs. package: whether this batchverify goes along.
    pip: requirements that the cluster installs first.
    """

    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    working_dir: str | None = None
    package: bool = True
    pip: tuple[str, ...] = ()

    @property
    def entrypoint(self) -> str:
        """The shell command; `exec`, so that the job's signal and exit code are those of the command."""
        return "exec " + shlex.join(["python", "-m", "batchverify.cli", *self.command])

    def runtime_env(self) -> dict[str, Any]:
        """What Ray prepares on every node. Raises `UsageError` for a variable that is not set here."""
        values = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        for name in self.env:
            if "=" in name:
                name = name.split("=", 1)[0]
                raise UsageError(
                    f"--env {name}: give the name alone; others can read a command line's values"
                )
            if name not in os.environ:
                raise UsageError(f"--env {name}: this variable is not set here")
            values[name] = os.environ[name]
        prepared: dict[str, Any] = {"env_vars": values}
        if self.package:
            prepared["py_modules"] = [str(Path(batchverify.__file__).resolve().parent)]
        if self.pip:
            prepared["pip"] = list(self.pip)
        if self.working_dir is not None:
            prepared["working_dir"] = str(Path(self.working_dir).resolve())
        return prepared

    def require_paths(self, arguments: dict[str, Any]) -> list[str]:
        """Refuse relative paths that mean nothing on the cluster; returns the absolute local ones that are read.

        arguments: the command's, by name. Raises `UsageError`.
        """
        local = {name: str(value) for name, value in arguments.items() if value and not scheme_of(str(value))}
        for name in WRITTEN:
            if name in local and not Path(local[name]).is_absolute():
                raise UsageError(
                    f"{local[name]}: a relative {name} would go with the job's folder on the cluster; give an "
                    "absolute path that all nodes see, or an object store (s3://…)"
                )
        if not local.get("backbone", "").endswith(WEIGHTS):
            local.pop("backbone", None)
        for name in READ:
            if name in local and not Path(local[name]).is_absolute():
                self._require_carried(local[name])
        return [local[name] for name in READ if name in local and Path(local[name]).is_absolute()]

    def _require_carried(self, path: str) -> None:
        if self.working_dir is None:
            raise UsageError(
                f"{path}: a relative path means nothing on the cluster; give an absolute path that all nodes "
                "see, an object store (s3://…), or the folder that it starts from with --working-dir"
            )
        if not GLOB & set(path) and not (Path(self.working_dir) / path).exists():
            raise UsageError(f"{path}: not in --working-dir {self.working_dir}")


@dataclass(frozen=True)
class JobState:
    """How a job stands. exit_code: None while it is not over."""

    job: str
    status: str
    exit_code: int | None
    message: str = ""


def _has_token(address: str) -> bool:
    """Whether there is a token: one that is named or, for a cluster of this machine, the one in Ray's file."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    here = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return here and (Path.home() / ".ray" / "auth_token").exists()


class _LostError(BatchverifyError):
    """The job server cannot be reached, perhaps for a moment."""


@dataclass
class _Log:
    """What a job has printed, without what was passed on before a contact was lost."""

    write: Callable[[str], None]
    passed: int = 0
    position: int = 0

    def begin(self) -> None:
        """The log comes from its start again."""
        self.position = 0

    def take(self, text: str) -> None:
        """Pass on what is new in the next piece."""
        self.position += len(text)
        if self.position > self.passed:
            self.write(text[-(self.position - self.passed) :])
            self.passed = self.position


class JobServer:
    """The job server of a cluster, at the dashboard's address. Raises our errors alone."""

    def __init__(self, address: str) -> None:
        if scheme_of(address) not in ("http", "https"):
            raise UsageError(
                f"--address {address}: submit talks to the cluster's job server, give its http://HEAD:8265"
                + ("; ray:// is Ray Client's, which breaks long jobs" if scheme_of(address) == "ray" else "")
            )
        self.address = address
        # Ray's client prefers these to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        if _has_token(address):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            import aiohttp  # noqa: F401  what the client does without, until it is used
            from ray.job_submission import JobSubmissionClient
        except ImportError as exc:
            raise UsageError(
                f"submit needs Ray's job client ({exc.name} is missing): pip install 'batchverify[cluster]'"
            ) from exc
        # What Ray says about its packaging and its connections.
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)
        with self._ours():
            self._client = JobSubmissionClient(address)

    def submit(self, submission: Submission) -> str:
        """Hand a command over; returns the job's id."""
        prepared = submission.runtime_env()
        with self._ours([os.environ[name] for name in submission.env]):
            return str(self._client.submit_job(entrypoint=submission.entrypoint, runtime_env=prepared))

    def state(self, job: str) -> JobState:
        """How a job stands."""
        with self._ours():
            info = self._client.get_job_info(job)
        status = str(info.status.value)
        codes = {"SUCCEEDED": 0, "STOPPED": STOPPED, "FAILED": info.driver_exit_code or 1}
        code = codes.get(status)
        # A negative one is the signal that ended the process.
        return JobState(job, status, 1 if code is not None and code < 0 else code, info.message or "")

    def stop(self, job: str) -> JobState:
        """Ask a job to end as Ctrl-C would, and wait until it has."""
        with self._ours():
            self._client.stop_job(job)
        deadline = time.monotonic() + STOP_SECONDS + LOST_SECONDS
        while (state := self.state(job)).exit_code is None and time.monotonic() < deadline:
            time.sleep(1)
        return state

    def follow(self, job: str, write: Callable[[str], None]) -> JobState:
        """Pass on what a job prints, as it comes, until it is over; contact that is lost is sought again."""
        log, last = _Log(write), time.monotonic()
        while True:
            try:
                state = self.state(job)
                if state.exit_code is not None:
                    self._rest(job, log)
                    return state
                asyncio.run(self._tail(job, log))
                last = time.monotonic()
            except _LostError as exc:
                if time.monotonic() - last > LOST_SECONDS:
                    raise BatchverifyError(f"{exc}; job {job} may go on") from exc
                time.sleep(RETRY_SECONDS)
            time.sleep(PAUSE_SECONDS)

    def _rest(self, job: str, log: _Log) -> None:
        """The end of a finished job's log; it may be gone with the node that held it."""
        with suppress(BatchverifyError), self._ours():
            text = self._client.get_job_logs(job)
            log.begin()
            log.take(text)

    async def _tail(self, job: str, log: _Log) -> None:
        import aiohttp

        log.begin()
        try:
            async for text in self._client.tail_job_logs(job):
                log.take(text)
        except (aiohttp.ClientError, OSError, RuntimeError) as exc:
            raise _LostError(f"{self.address}: the job's log broke off: {exc}") from exc

    @contextmanager
    def _ours(self, secrets: Sequence[str] = ()) -> Iterator[None]:
        """The seam: errors of Ray's client as ours, with no secret in them."""
        import ray.exceptions
        import requests

        try:
            yield
        except ray.exceptions.AuthenticationError as exc:
            raise UsageError(
                f"{self.address}: the cluster wants a token and this one is missing or wrong: put it into "
                "RAY_AUTH_TOKEN, or its file's name into RAY_AUTH_TOKEN_PATH; for ~/.ray/auth_token set "
                "RAY_AUTH_MODE=token (on this machine that file is found)"
            ) from exc
        except (ConnectionError, requests.RequestException) as exc:
            raise _LostError(f"{self.address}: the cluster's job server cannot be reached: {exc}") from exc
        except (RuntimeError, ValueError) as exc:
            text = str(exc)
            for secret in filter(None, secrets):
                text = text.replace(secret, "***")
            raise BatchverifyError(f"{self.address}: {text.strip()}") from exc
