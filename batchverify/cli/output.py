"""Shared by all commands: setting up the process, showing the summary."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import click

from batchverify.errors import NothingScoredError
from batchverify.progress import tell

# Variables whose values no message shows.
SECRETS = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AZURE_STORAGE_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET", "RAY_AUTH_TOKEN"),
)
# Shorter values are no secrets, and parts of ordinary words.
LEAST_SECRET = 8
# Terminals take control characters for commands, and show the rest of a line reversed after some marks.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_PASSWORD = re.compile(r"(?<=:/)(/?)[^/\s@:]+:[^/\s@]+@")
# The exit code after Ctrl-C.
INTERRUPTED = 130


def open_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null where they are closed, as daemons and cron lines leave them.

    Otherwise the next file, perhaps an output, is opened under their number, and what a library prints goes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free. Ray's processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf8"))  # noqa: SIM115  until the end


def drop_unread() -> None:
    """Point stderr to /dev/null if nobody reads it any more: Python would end with exit code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def printable(text: str) -> str:
    """A text as a terminal may show it: without secrets of the environment, passwords in URIs, control characters."""
    for value in map(os.environ.get, SECRETS):
        if value and len(value) >= LEAST_SECRET:
            text = text.replace(value, "…")
    text = _PASSWORD.sub(r"\1…@", text)
    return _CONTROLS.sub(lambda match: ascii(match.group())[1:-1], text)


def show(text: str, *, err: bool = False) -> None:
    """Print a text for people that holds names from manifests, files or stores."""
    if err:
        tell(printable(text) + "\n")
    else:
        click.echo(printable(text))


def show_result(result: Any, text: str, as_json: bool) -> None:
    """Print a result: its JSON as it is, for programs, or a text for people."""
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        show(text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up(verbose: bool) -> None:
    """Set up the process: logging, SIGTERM handled like Ctrl-C, batchverify's limits instead of Pillow's, memory."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from batchverify.faces.images import own_process
    from batchverify.process import collect_rarely, keep_freed_memory

    own_process()
    keep_freed_memory()
    collect_rarely()


@contextmanager
def reporting(as_json: bool, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A function that takes the summary, which is shown at the end, even if too few rows were scored.

    Meanwhile stdout goes to stderr: Ray prints there when a worker dies, and stdout is for the summary alone.
    """
    summaries: list[Any] = []
    try:
        with redirect_stdout(sys.stderr):
            yield summaries.append
    except NothingScoredError as exc:
        if exc.summary is not None:
            summaries.append(exc.summary)
        raise
    finally:
        for summary in summaries:
            if as_json:
                click.echo(json.dumps(summary.to_json()))
            elif not quiet:
                width = max(len(name) for name, _ in summary.lines())
                for name, value in summary.lines():
                    show(f"{name.ljust(width)}  {value}", err=True)
