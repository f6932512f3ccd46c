"""A command over toys that is killed, in fresh folders, and what must be true after the same command again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from failing_benches import write_pairs
from fork_server import ForkServer
from toys import colour, draw

from batchverify.cache.maintenance import verify_cache

IMAGES, PAIRS, PART = 240, 6000, 500
NAMES = ("one.parquet", "folder")
# Calls that change something on the disk.
CHANGES = {
    "create",
    "write",
    "pwrite",
    "mkdir",
    "rmdir",
    "unlink",
    "remove",
    "replace",
    "fsync",
    "delete",
    "flock",
}
Content = list[tuple[str, pa.Schema]]


def draw_toys(folder: Path) -> Path:
    """A manifest of pictures of one colour each; one is missing and one is no picture."""
    folder.mkdir()
    names = [f"{number}.png" for number in range(IMAGES)]
    for number, name in enumerate(names):
        draw(folder / name, colour(number))
    (folder / names[1]).write_text("no picture")
    (folder / names[2]).unlink()
    dice = random.Random(0)
    return write_pairs(folder / "pairs.csv", [(*dice.choices(names, k=2), row) for row in range(PAIRS)])


def content(output: Path) -> Content:
    """The hashed bytes and the schema of an output's files. Without their footers, which hold times."""
    found = []
    for file in [output] if output.suffix else sorted(output.glob("part-*.parquet")):
        data = file.read_bytes()
        footer = int.from_bytes(data[-8:-4], "little")
        digest = sha256(data[: -8 - footer]).hexdigest()
        found.append((digest, pq.read_schema(file).remove_metadata()))
    return found


def check(place: Path, name: str, expected: Content) -> None:
    """After a run: the expected bytes, nothing temporary, and a cache in which every image stands once."""
    assert content(place / "out" / name) == expected
    names = [str(path.relative_to(place)) for path in place.rglob("*")]
    left = [each for each in names if each.endswith((".tmp", ".job")) or ".batchverify-" in each]
    assert not left, left
    assert [path.name for path in (place / "out").iterdir()] == [name]
    report = verify_cache(str(place / "cache"))
    assert report.ok and not report.foreign
    keys = [key for path in place.rglob("data/*.parquet") for key in pq.read_table(path)["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == IMAGES - 2


@dataclass
class Undisturbed:
    """A run that nothing disturbed. changes: the numbers of those of its I/O calls that change something."""

    content: Content
    seconds: float
    changes: list[int]


class KillBench:
    """kills: how many runs of the command were killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server, self.kills, self._places = folder, ForkServer(folder), 0, 0
        self.manifest = draw_toys(folder / "in")
        self.expected = {name: self._undisturbed(name) for name in NAMES}

    def place(self) -> Path:
        """A fresh folder."""
        self._places += 1
        place = self.folder / f"run-{self._places}"
        (place / "tmp").mkdir(parents=True)
        return place

    def start(self, place: Path, name: str, *, count: bool = False, at: int = -1) -> int:
        """Start the command; see `ForkServer`."""
        where = ["-o", str(place / "out" / name), "--cache", str(place / "cache")]
        how = ["--part-rows", str(PART), "--crop", "none", "--engine", "local", "--num-cpus", "2", "-q"]
        return self.server.start(["score", str(self.manifest), *where, *how], place, count=count, at=at)

    def kill(self, place: Path, name: str, moment: float) -> bool:
        """Start the command and kill it after so many seconds; whether it still ran."""
        process = self.start(place, name)
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        return self._was_killed()

    def kill_at(self, place: Path, name: str, call: int) -> bool:
        """Start the command, which kills itself before an I/O call; whether it made so many."""
        self.start(place, name, count=True, at=call)
        return self._was_killed()

    def finish(self, place: Path, name: str) -> None:
        """Run the command undisturbed, and check what it leaves."""
        self.start(place, name)
        ended = self.server.wait()
        assert ended.code == 0, ended.said
        check(place, name, self.expected[name].content)
        shutil.rmtree(place)

    def _was_killed(self) -> bool:
        ended = self.server.wait()
        assert ended.code in (0, -signal.SIGKILL), ended.said
        self.kills += ended.code != 0
        return ended.code != 0

    def _undisturbed(self, name: str) -> Undisturbed:
        place, started = self.place(), time.monotonic()
        self.start(place, name)
        ended, seconds = self.server.wait(), time.monotonic() - started
        assert ended.code == 0, ended.said
        self.start(self.place(), name, count=True)
        calls = self.server.wait().calls
        changes = [number for number, call in enumerate(calls) if call in CHANGES]
        return Undisturbed(content(place / "out" / name), seconds, changes)
