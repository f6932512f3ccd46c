"""The progress line: one line on a terminal, plain lines elsewhere, and the time left."""

import io
import sys
import time
from typing import Any

import pytest

from batchverify.progress import Progress, duration, is_terminal, show_download, tell


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def eager(**counts: Any) -> Progress:
    """A progress that shows every line."""
    return Progress(**counts, terminal_seconds=0, plain_seconds=0)


def test_a_terminal_gets_one_line_that_fits_and_is_cleared(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    shown = eager(total=123_456_789, cached=1_000_000, embedded=2_000_000, failed=3_000, stream=stream)
    shown.show()
    shown.show()
    lines = stream.getvalue().split("\r")[1:]
    assert len(lines) == 2
    assert all(len(line) < 60 for line in lines)
    assert "\n" not in stream.getvalue()
    shown.clear()
    assert stream.getvalue().endswith("\r" + " " * len(lines[0]) + "\r")


def test_elsewhere_lines_are_plain():
    stream = io.StringIO()
    eager(total=10, cached=4, failed=1, stream=stream).show()
    assert stream.getvalue() == "images 5/10  cached 4  embedded 0  failed 1  0.0 images/s\n"


def test_the_rate_counts_from_the_first_embedded_chunk(monkeypatch):
    now = iter([1e9, 1e9 + 10])
    stream = io.StringIO()
    shown = eager(total=1100, stream=stream)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    shown.embedded = 100
    shown.show()
    shown.embedded = 300
    shown.show()
    assert "20.0 images/s  40 s left" in stream.getvalue().splitlines()[-1]


def test_the_first_plain_line_has_a_rate(monkeypatch):
    start = time.monotonic()
    now = iter([start + 1, start + 21])
    stream = io.StringIO()
    shown = Progress(total=1100, stream=stream)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    shown.embedded = 100
    shown.show()
    assert not stream.getvalue()
    shown.embedded = 300
    shown.show()
    assert "10.0 images/s  1 min 20 s left" in stream.getvalue()


def test_quiet_is_quiet():
    stream = Terminal()
    shown = eager(total=1, quiet=True, stream=stream)
    shown.show()
    shown.say("something")
    assert stream.getvalue() == ""


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (0.4, 59.4, 185, 7_805)] == [
        "0 s",
        "59 s",
        "3 min 5 s",
        "2 h 10 min",
    ]


def test_a_download_is_reported_once_without_a_terminal(capsys):
    for done in (0, 50_000_000, 100_000_000):
        show_download(done, 100_000_000)
    assert capsys.readouterr().err == "\rdownloading weights: 100% of 100 MB\n"


class Unread(io.StringIO):
    """What is left of a pipe whose reader has ended, or of a terminal that has hung up."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class Bare:
    """What programs put in the place of stderr: no more than a method to write."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """Nothing to do."""


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Unread(), closed(), Bare()])
def test_a_run_goes_on_where_nobody_can_read_what_it_says(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    shown = eager(total=10, cached=4)
    shown.show()
    shown.say("a message")
    shown.clear()
    show_download(5, 5)
    tell("text")
    assert not is_terminal()
    if isinstance(stream, Bare):
        assert stream.text.startswith("images 4/10") and stream.text.endswith("text")
