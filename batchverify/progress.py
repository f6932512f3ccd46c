"""What a run says while it goes on: one progress line, and the seconds of its stages."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from shutil import get_terminal_size
from typing import Protocol, TextIO

TERMINAL_SECONDS = 0.2
PLAIN_SECONDS = 15.0


@dataclass
class Stopwatch:
    """Wall-clock seconds by name of the stage, added up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - started})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add another watch's seconds."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more


class Measured(Protocol):
    """A result that says how long its stages took, and how much memory (MB) its worker had so far."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """By stage."""

    @property
    def peak_memory(self) -> float:
        """0 where that cannot be told."""


@dataclass
class Progress:
    """Counts of a run, shown as it goes.

    total: unique images to look up. cached, embedded, repeated (bytes of another image), failed: what became of
    them so far. image_seconds: how long that took. watch: seconds by stage, of all workers. rows: pairs written.
    worker_memory: the most that a worker had, in MB.
    """

    total: int = 0
    cached: int = 0
    embedded: int = 0
    repeated: int = 0
    failed: int = 0
    image_seconds: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)
    worker_memory: float = 0.0
    rows: int = 0
    total_rows: int = 0
    quiet: bool = False
    stream: TextIO | None = None
    _first: tuple[float, int] | None = None
    _shown: float = field(default_factory=time.monotonic)
    _width: int = 0

    @property
    def done(self) -> int:
        """Images whose fate is known."""
        return self.cached + self.embedded + self.repeated + self.failed

    def measure(self, done: Measured) -> None:
        """Take note of what a worker's result says about it."""
        self.watch.add(done.seconds)
        self.worker_memory = max(self.worker_memory, done.peak_memory)

    def show(self) -> None:
        """Draw the line when enough time has passed since the last."""
        stream = self.stream or sys.stderr
        terminal = stream.isatty()
        now = time.monotonic()
        if self._first is None and self.embedded:
            # From the first embedded chunk on: what start-up took says nothing about the time left.
            self._first = (now, self.embedded)
        if self.quiet or now - self._shown < (TERMINAL_SECONDS if terminal else PLAIN_SECONDS):
            return
        self._shown = now
        line = self._line(now)
        if terminal:
            line = line[: get_terminal_size().columns - 1]
        if terminal:
            stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            stream.write(line + "\n")
        stream.flush()

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._width:
            stream = self.stream or sys.stderr
            stream.write("\r" + " " * self._width + "\r")
            stream.flush()
            self._width = 0

    def say(self, text: str) -> None:
        """A line of its own above the progress line."""
        if not self.quiet:
            self.clear()
            (self.stream or sys.stderr).write(text + "\n")

    def _line(self, now: float) -> str:
        if self.rows:
            return f"pairs {self.rows:,}/{self.total_rows:,}"
        since, before = self._first or (now, 0)
        rate = (self.embedded - before) / max(now - since, 1e-9)
        line = (
            f"images {self.done:,}/{self.total:,}  cached {self.cached:,}  embedded {self.embedded:,}  "
            f"failed {self.failed:,}  {rate:.1f} images/s"
        )
        if rate and self.done < self.total:
            line += f"  {duration((self.total - self.done) / rate)} left"
        return line


def show_download(done: int, total: int | None) -> None:
    """A line on stderr while weights are fetched: drawn again on a terminal, at the end elsewhere."""
    finished = done == total
    if not (sys.stderr.isatty() or finished):
        return
    share = f"{done / total:4.0%} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
    sys.stderr.write(f"\rfetching weights: {share}" + ("\n" if finished else ""))
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds for people: `8 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
