"""Jobs in processes of their own that are killed at random moments, and what must be true afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from ray_nodes import RayNodes

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
# A pause after each part, so that kills fall between them on the fastest machine.
SCRIPT = """
import time
from batchverify.scoring import parquet
finish = parquet.FileSink.finish
parquet.FileSink.finish = lambda sink, record: (finish(sink, record), time.sleep({pause}))
from functools import partial
from batchverify.engine import base
from batchverify.scoring import job
{toy}
# Chunks small enough that the first segment is there long before the last chunk.
base.CPU_CHUNK = 32
job.EmbeddingCache = partial(job.EmbeddingCache, commit_rows=64, commit_seconds=2.0)
from batchverify.cli.app import main
main({arguments!r})
"""
# Nodes on a machine that is busy answer late. Those that are killed are found out by the driver itself.
PATIENT = {"RAY_health_check_failure_threshold": "20"}
# The toy embeds, in the workers as well.
TOY = "from toys import ToyPlan; job.WorkPlan = partial(ToyPlan, log={log!r}, pause={pause!r})"
SUPPORT = str(Path(__file__).parent)


def program(arguments: Sequence[str], *, pause: float, toy: str = "") -> str:
    """A Python program that is the command, with small chunks. pause: seconds without work after each part."""
    return SCRIPT.format(arguments=list(arguments), pause=pause, toy=toy)


def draw_pairs(folder: Path, images: int, pairs: int) -> Path:
    """A manifest of random pairs of `images` small noise pictures; some are missing or no picture at all."""
    generator = np.random.default_rng(0)
    for number in range(images):
        small = generator.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(small).resize((160, 160)).save(folder / f"{number}.jpg")
    (folder / "1.jpg").write_text("no picture")
    (folder / "2.jpg").unlink()
    chosen = generator.integers(0, images, (pairs, 2))
    lines = [f"{a}.jpg,{b}.jpg,{row}" for row, (a, b) in enumerate(chosen)]
    (folder / "pairs.csv").write_text("image_a,image_b,row\n" + "\n".join(lines) + "\n")
    return folder / "pairs.csv"


@dataclass(frozen=True)
class Blow:
    """What is done to a run: a signal to the driver, or an `actor` or another `worker` of its Ray is killed.

    after: seconds since the blow before, or, with `wait_for`, since a new `segment` of the cache or `part`.
    """

    how: str
    after: float
    wait_for: str = ""


@dataclass
class KilledJob:
    """One `score` command, run again and again until it gets through.

    pause: seconds without work after each part. toy: the toy embeds, in so many seconds a chunk. kills: the blows
    that met it.
    """

    manifest: Path
    out: Path
    cache: Path
    part_rows: int
    engine: str = "local"
    pause: float = 0.0
    toy: float | None = None
    kills: list[Blow] = field(default_factory=list)
    _parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def engine_options(self) -> list[str]:
        """Those that say who does the work."""
        return ["--engine", self.engine, "--num-cpus", "2"]

    def environment(self) -> dict[str, str]:
        """That of the command."""
        # A worker that is killed while it starts is waited for, by default for a minute.
        return {**os.environ, **with_toys(), "RAY_worker_register_timeout_seconds": "20"}

    def close(self) -> None:
        """End what the runs left."""

    def command(self) -> list[str]:
        """The command in a process of its own."""
        options = ["--crop", "none", "--cache", str(self.cache), "--part-rows", str(self.part_rows)]
        arguments = ["score", str(self.manifest), "-o", str(self.out), *options]
        arguments += [*self.engine_options(), "--json", "-q"]
        return [sys.executable, "-c", self.script(arguments)]

    def script(self, arguments: list[str]) -> str:
        """The program."""
        toy = "" if self.toy is None else TOY.format(log=f"{self.cache}.embedded", pause=self.toy)
        return program(arguments, pause=self.pause, toy=toy)

    def start(self) -> subprocess.Popen:
        """The command, begun."""
        return subprocess.Popen(
            self.command(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=self.environment(),
        )

    def kill(self, how: str, after: float, *, wait_for: str = "") -> bool:
        """Run, with one blow; whether that met a run."""
        return self.run([Blow(how, after, wait_for)]) == 1

    def run(self, blows: Sequence[Blow]) -> int:
        """Run with blows, one after the other; how many fell before the run was over.

        Who loses a worker or an actor goes on by itself, until a blow falls on the driver.
        """
        process, fallen = self.start(), 0
        while fallen < len(blows) and self._fall(process, blows[fallen]):
            self.kills.append(blows[fallen])
            fallen += 1
        _, said = process.communicate(timeout=170)
        assert "Traceback" not in said, said
        if fallen < len(blows) or blows[-1].how not in SIGNALS:
            assert process.returncode == 0, said
        self.check_parts()
        return fallen

    def _fall(self, process: subprocess.Popen, blow: Blow) -> bool:
        before = self.files(blow.wait_for)
        while blow.wait_for and process.poll() is None and self.files(blow.wait_for) <= before:
            time.sleep(0.002)
        with suppress(subprocess.TimeoutExpired):
            process.wait(blow.after)
        while process.poll() is None:
            if self.send(process.pid, blow.how):
                return True
            time.sleep(0.01)
        return False

    def send(self, driver: int, how: str) -> bool:
        """One blow; whether there was what it was to meet."""
        return send(driver, how, descendants(driver))

    def finish(self) -> dict:
        """The undisturbed last run; its summary."""
        done = subprocess.run(self.command(), capture_output=True, text=True, timeout=170, env=self.environment())
        assert done.returncode == 0, done.stderr
        self.check_parts()
        return json.loads(done.stdout)

    def files(self, kind: str) -> int:
        """How many segments of the cache, or parts, there are."""
        if kind == "segment":
            return len(list(self.cache.rglob("data/*.parquet")))
        return len(list(self.parts_folder.glob("part-*.parquet")))

    @property
    def parts_folder(self) -> Path:
        """Where the parts of the unfinished output lie."""
        return self.out if not self.out.suffix else self.out.with_name(self.out.name + ".job")

    def check_parts(self) -> None:
        """A part that was published once is never written again."""
        stats = {path.name: path.stat() for path in self.parts_folder.glob("part-*.parquet")}
        now = {name: (each.st_ino, each.st_mtime_ns) for name, each in stats.items()}
        rewritten = [name for name, seen in self._parts.items() if now.get(name, seen) != seen]
        assert rewritten == [], rewritten
        self._parts |= now

    def embedded_twice(self) -> int:
        """Images of committed cache segments that stand in another one, too."""
        keys: Counter[bytes] = Counter()
        for path in self.cache.rglob("data/*.parquet"):
            keys.update(pq.read_table(path, columns=["key"])["key"].to_pylist())
        return sum(count - 1 for count in keys.values())

    def table(self):
        """The output's rows."""
        paths = [self.out] if self.out.suffix else sorted(self.out.glob("part-*.parquet"))
        return [pq.ParquetFile(path).read() for path in paths]


class ClusterJob(KilledJob):
    """The same on a cluster of three nodes: the head, which runs nothing, and two of which one may be killed."""

    def __init__(
        self,
        manifest: Path,
        out: Path,
        cache: Path,
        part_rows: int,
        *,
        pause: float = 0.0,
        toy: float | None = None,
    ) -> None:
        super().__init__(manifest, out, cache, part_rows, engine="ray", pause=pause, toy=toy)
        self.nodes = RayNodes("a-token-of-32-characters-and-more")
        self.nodes.start("head", 0, "--include-dashboard=false", **with_toys(), **PATIENT)
        self._names = [f"n{number}" for number in range(100)]
        self._alive = [self._join(), self._join()]

    def engine_options(self) -> list[str]:
        """See `KilledJob`."""
        return ["--address", f"127.0.0.1:{self.nodes.gcs}"]

    def environment(self) -> dict[str, str]:
        """See `KilledJob`."""
        return self.nodes.environment(**with_toys(), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.nodes.token)

    def renew(self, out: Path, cache: Path) -> None:
        """From now on another job on the same cluster."""
        self.out, self.cache, self._parts = out, cache, {}

    def send(self, driver: int, how: str) -> bool:
        """See `KilledJob`; a node is replaced by a new one."""
        if how != "node":
            return send(driver, how, [each for name in self._alive for each in self.nodes.processes(name)])
        self.nodes.kill(self._alive.pop(0))
        self._alive.append(self._join())
        return True

    def close(self) -> None:
        """See `KilledJob`."""
        self.nodes.close()

    def _join(self) -> str:
        name = self._names.pop(0)
        self.nodes.start(name, 1, **with_toys(), **PATIENT)
        return name


def with_toys() -> dict[str, str]:
    """The environment in which workers find the toy."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), SUPPORT]))}


def send(driver: int, how: str, processes: Sequence[int]) -> bool:
    """End the driver by a signal, or kill an actor or another worker among processes; whether there was one."""
    if how in SIGNALS:
        os.kill(driver, SIGNALS[how])
        return True
    names = {each: name_of(each) for each in processes}
    # Ray's own agents are named like workers; one that dies takes the node along.
    wanted = ("ray::PairWorker",) if how == "actor" else ("ray::load_chunk", "ray::IDLE")
    found = [each for each, name in names.items() if name.startswith(wanted)]
    if found:
        os.kill(random.choice(found), signal.SIGKILL)
    return bool(found)


def descendants(process: int) -> list[int]:
    """The processes that it started, and those that these started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, last = [], {process}
    while last:
        last = {each for each, parent in parents.items() if parent in last}
        found += last
    return found


def name_of(process: int) -> str:
    """The name that a process gave itself."""
    try:
        return (Path("/proc") / str(process) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
