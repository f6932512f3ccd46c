"""Shared by all commands: setting up the process, showing the summary."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import click

from batchverify.errors import NothingScoredError
from batchverify.progress import tell

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


def set_up(verbose: bool) -> None:
    """Set up the process: logging, SIGTERM handled like Ctrl-C, batchverify's limits instead of Pillow's, memory."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
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
        summaries.append(exc.summary)
        raise
    finally:
        for summary in summaries:
            if as_json:
                click.echo(json.dumps(summary.to_json()))
            elif not quiet:
                _show_table(summary.lines())


def _show_table(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        tell(f"{name.ljust(width)}  {value}\n")
