"""A command as a job on a Ray cluster, through the cluster's job server: submit, follow, query, stop."""

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
from batchverify.embedding.backbone import fused_names, is_file
from batchverify.errors import BatchverifyError, UsageError
from batchverify.storage.location import scheme_of

# Ray gives a stopped job 3 seconds; ours first finishes and commits the images that are being embedded.
STOP_SECONDS = 60
STOPPED = 130
# If the job server cannot be reached for so long, following ends; the job goes on.
LOST_SECONDS = 300.0
RETRY_SECONDS = 2.0
POLL_SECONDS = 0.2
# Arguments of our commands that are paths.
READ_PATHS = ("manifest", "train", "dev", "test", "scores", "image_root", "head", "weights")
WRITTEN_PATHS = ("output", "cache", "tensorboard")
GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Submission:
    """A command for the cluster.

    command: the words after `batchverify`. env: names of environment variables whose values are passed on.
    working_dir: a folder that is sent along and in which the command runs. package: whether this batchverify is
    sent along. pip: requirements that the cluster installs first.
    """

    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    working_dir: str | None = None
    package: bool = True
    pip: tuple[str, ...] = ()

    @property
    def entrypoint(self) -> str:
        """The shell command. `exec`: signals reach the command, and its exit code is the job's."""
        return "exec " + shlex.join(["python", "-m", "batchverify.cli", *self.command])

    def runtime_env(self) -> dict[str, Any]:
        """The environment that Ray prepares on every node. Raises `UsageError` for a variable that is not set."""
        values = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        for name in self.env:
            if "=" in name:
                name = name.split("=", 1)[0]
                raise UsageError(
                    f"--env {name}: give only the name; other users can read the values on a command line"
                )
            if name not in os.environ:
                raise UsageError(f"--env {name}: this variable is not set here")
            values[name] = os.environ[name]
        environment: dict[str, Any] = {"env_vars": values}
        if self.package:
            environment["py_modules"] = [str(Path(batchverify.__file__).resolve().parent)]
        if self.pip:
            environment["pip"] = list(self.pip)
        if self.working_dir is not None:
            environment["working_dir"] = str(Path(self.working_dir).resolve())
        return environment

    def require_paths(self, arguments: dict[str, Any]) -> list[str]:
        """Check that the cluster can resolve the paths; returns the absolute local paths that are read.

        arguments: of the command, by name. Raises `UsageError` for a relative path that means nothing there.
        """
        local = {name: str(value) for name, value in arguments.items() if value and not scheme_of(str(value))}
        backbones = [name for name in fused_names(local.pop("backbone", "")) if is_file(name)]
        for name in WRITTEN_PATHS:
            if name in local and not Path(local[name]).is_absolute():
                raise UsageError(
                    f"{local[name]}: a relative {name} would be deleted with the job's folder on the cluster; give "
                    "an absolute path that all nodes see, or an object store (s3://…)"
                )
        read = [local[name] for name in READ_PATHS if name in local] + backbones
        for path in read:
            if not Path(path).is_absolute():
                self._require_sent(path)
        return [path for path in read if Path(path).is_absolute()]

    def _require_sent(self, path: str) -> None:
        if self.working_dir is None:
            raise UsageError(
                f"{path}: a relative path means nothing on the cluster; give an absolute path that all nodes "
                "see, an object store (s3://…), or with --working-dir the folder that the path starts from"
            )
        if not GLOB_CHARACTERS & set(path) and not (Path(self.working_dir) / path).exists():
            raise UsageError(f"{path}: not in --working-dir {self.working_dir}")


@dataclass(frozen=True)
class JobState:
    """The state of a job. exit_code: None until it has ended."""

    job: str
    status: str
    exit_code: int | None
    message: str = ""


class _LostError(BatchverifyError):
    """The job server cannot be reached, perhaps only for a moment."""


@dataclass
class _Log:
    """The log of a job. After a lost connection it comes from its start again; `write` gets each text once.

    position: of the next text. written: what `write` has got so far; both in characters.
    """

    write: Callable[[str], None]
    written: int = 0
    position: int = 0

    def take(self, text: str) -> None:
        """Write the part of the next text that is new."""
        self.position += len(text)
        if self.position > self.written:
            self.write(text[-(self.position - self.written) :])
            self.written = self.position


class JobServer:
    """The job server of a cluster, at the dashboard's address. Errors of Ray's client are raised as ours."""

    def __init__(self, address: str) -> None:
        if scheme_of(address) not in ("http", "https"):
            raise UsageError(
                f"--address {address}: submit needs the address of the cluster's job server, http://HEAD:8265"
                + ("; ray:// is for Ray Client, which breaks long jobs" if scheme_of(address) == "ray" else "")
            )
        self.address = address
        # Ray's client prefers this variable to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        if _has_token(address):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            import aiohttp  # noqa: F401  the client imports it only when it is used
            from ray.job_submission import JobSubmissionClient
        except ImportError as exc:
            raise UsageError(
                f"submit needs Ray's job client ({exc.name} is missing): pip install 'batchverify[cluster]'"
            ) from exc
        # Hide what Ray reports about packaging and connections.
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)
        with self._our_errors():
            self._client = JobSubmissionClient(address)

    def submit(self, submission: Submission) -> str:
        """Submit a command; returns the job's id."""
        runtime_env = submission.runtime_env()
        with self._our_errors([os.environ[name] for name in submission.env]):
            return str(self._client.submit_job(entrypoint=submission.entrypoint, runtime_env=runtime_env))

    def state(self, job: str) -> JobState:
        """The present state of a job."""
        with self._our_errors():
            info = self._client.get_job_info(job)
        status = str(info.status.value)
        codes = {"SUCCEEDED": 0, "STOPPED": STOPPED, "FAILED": info.driver_exit_code or 1}
        code = codes.get(status)
        # A negative code is the signal that ended the process.
        return JobState(job, status, 1 if code is not None and code < 0 else code, info.message or "")

    def stop(self, job: str) -> JobState:
        """Stop a job as Ctrl-C would, and wait until it has ended."""
        with self._our_errors():
            self._client.stop_job(job)
        deadline = time.monotonic() + STOP_SECONDS + LOST_SECONDS
        while (state := self.state(job)).exit_code is None and time.monotonic() < deadline:
            time.sleep(1)
        return state

    def follow(self, job: str, write: Callable[[str], None]) -> JobState:
        """Pass on what a job prints until it ends; reconnect after a lost connection."""
        log, last = _Log(write), time.monotonic()
        while True:
            try:
                state = self.state(job)
                if state.exit_code is not None:
                    self._read_rest(job, log)
                    return state
                asyncio.run(self._tail(job, log))
                last = time.monotonic()
            except _LostError as exc:
                if time.monotonic() - last > LOST_SECONDS:
                    raise BatchverifyError(f"{exc}; job {job} may go on") from exc
                time.sleep(RETRY_SECONDS)
            time.sleep(POLL_SECONDS)

    def _read_rest(self, job: str, log: _Log) -> None:
        """Read the end of a finished job's log, which may have been lost with its node."""
        with suppress(BatchverifyError), self._our_errors():
            text = self._client.get_job_logs(job)
            log.position = 0
            log.take(text)

    async def _tail(self, job: str, log: _Log) -> None:
        import aiohttp

        log.position = 0
        try:
            async for text in self._client.tail_job_logs(job):
                log.take(text)
        except (aiohttp.ClientError, OSError, RuntimeError) as exc:
            raise _LostError(f"{self.address}: the job's log broke off: {exc}") from exc

    @contextmanager
    def _our_errors(self, secrets: Sequence[str] = ()) -> Iterator[None]:
        """Raise errors of Ray's client as ours, without the secrets."""
        import ray.exceptions
        import requests

        # Earlier releases of Ray know no tokens.
        unauthorized = getattr(ray.exceptions, "AuthenticationError", ())
        try:
            yield
        except unauthorized as exc:
            raise UsageError(
                f"{self.address}: the cluster requires a token, and it is missing or wrong: set RAY_AUTH_TOKEN to "
                "the token or RAY_AUTH_TOKEN_PATH to its file; to use ~/.ray/auth_token, set RAY_AUTH_MODE=token "
                "(not needed for a cluster on this machine)"
            ) from exc
        except (ConnectionError, requests.RequestException) as exc:
            raise _LostError(f"{self.address}: the cluster's job server cannot be reached: {exc}") from exc
        except (RuntimeError, ValueError) as exc:
            text = str(exc)
            for secret in filter(None, secrets):
                text = text.replace(secret, "***")
            raise BatchverifyError(f"{self.address}: {text.strip()}") from exc


def _has_token(address: str) -> bool:
    """Whether a token is set or, for a cluster on this machine, is in Ray's file."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    is_local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    # Without a home folder `~` stays.
    return is_local and os.path.exists(os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH110, PTH111
