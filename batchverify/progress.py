"""Progress of a run: the progress line, messages on stderr, and the seconds of its stages."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from shutil import get_terminal_size
from typing import TextIO

TERMINAL_SECONDS = 0.2
PLAIN_SECONDS = 15.0


@dataclass
class Stopwatch:
    """Total wall-clock seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with` block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - started})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add another watch's seconds."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more


@dataclass
class Progress:
    """Counts of a run and the line that shows them.

    total: unique images to look up. cached, embedded, repeated (same bytes as another image), failed: what became
    of them so far. image_seconds: how long that took. watch: seconds by stage, of all workers. rows: pairs written.
    worker_memory: peak of any worker, in MB. terminal_seconds, plain_seconds: pause between two lines, on a terminal
    and elsewhere.
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
    terminal_seconds: float = TERMINAL_SECONDS
    plain_seconds: float = PLAIN_SECONDS
    _first: tuple[float, int] | None = None
    _shown: float = field(default_factory=time.monotonic)
    _width: int = 0

    @property
    def done(self) -> int:
        """Images that are done, in whatever way."""
        return self.cached + self.embedded + self.repeated + self.failed

    def measure(self, seconds: Mapping[str, float], peak_memory: float) -> None:
        """Record a worker's seconds by stage and its peak memory in MB, 0 if unknown."""
        self.watch.add(seconds)
        self.worker_memory = max(self.worker_memory, peak_memory)

    def show(self) -> None:
        """Draw the line if enough time has passed since it was last drawn."""
        terminal = is_terminal(self.stream)
        now = time.monotonic()
        if self._first is None and self.embedded:
            # The rate counts from the first embedded chunk: start-up time says nothing about the time left.
            self._first = (now, self.embedded)
        if self.quiet or now - self._shown < (self.terminal_seconds if terminal else self.plain_seconds):
            return
        self._shown = now
        line = self._line(now)
        if terminal:
            line = line[: get_terminal_size().columns - 1]
            tell("\r" + line.ljust(self._width), self.stream)
            self._width = len(line)
        else:
            tell(line + "\n", self.stream)

    def clear(self) -> None:
        """Erase the line from the terminal."""
        if self._width:
            tell("\r" + " " * self._width + "\r", self.stream)
            self._width = 0

    def say(self, text: str) -> None:
        """Print a message on its own line, above the progress line."""
        if not self.quiet:
            self.clear()
            tell(text + "\n", self.stream)

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


def tell(text: str, stream: TextIO | None = None) -> None:
    """Write to a stream, by default stderr. Where nobody can read it, it is dropped: no run ends for that.

    Daemons and services have no stderr, terminals hang up, the readers of pipes end, and log disks fill.
    """
    stream = stream or sys.stderr
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether a stream, by default stderr, is a terminal. Objects in the place of stderr may lack the method."""
    try:
        return (stream or sys.stderr).isatty()
    except (AttributeError, OSError, ValueError):
        return False


def show_download(done: int, total: int | None) -> None:
    """Show the progress of a download on stderr: continuously on a terminal, otherwise once at the end."""
    finished = done == total
    if not (is_terminal() or finished):
        return
    share = f"{done / total:4.0%} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
    tell(f"\rdownloading weights: {share}" + ("\n" if finished else ""))


def duration(seconds: float) -> str:
    """Seconds for people: `8 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
