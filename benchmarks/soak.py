"""Hours of work with faults, and what grows: `python benchmarks/soak.py [--minutes 10] [--record]`.

One process scores the same pairs again and again, in cycles of five rounds: on a disk; in an object store that
fails now and then; a command on the disk that is killed and resumed; one in the store that is killed and resumed;
and the caches: images forgotten, segments compacted, everything verified. One image in twenty is broken. After
each round the rows must be those of an undisturbed run. After each cycle this process's open files, threads and
memory are counted, and temporary files, bytes on the disk and in the store. From the second cycle on none of them
may grow. Exits with code 1 if one does, or if a row differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from results import publish, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from killing import SIGNALS, KilledJob, draw_pairs, program
from s3_server import KEYS, s3_client, s3_options

import batchverify
from batchverify.cache.image_keys import keys_of
from batchverify.cache.maintenance import verify_cache
from batchverify.cache.rewriting import compact, erase
from batchverify.errors import BatchverifyError
from batchverify.storage.location import Location

SUPPORT = sys.path[0]
PART_ROWS = 500
# How often a command is given whose store fails.
TRIES = 3
FORGOTTEN = 12
BUCKET = "soak"
FAULTS = {"500": 0.01, "503": 0.01, "reset": 0.005}
OPTIONS: dict[str, Any] = {"crop": "none", "quiet": True, "engine": "local", "num_cpus": 2}
# The store in a process of its own: what it needs is not counted.
STORE = """
import sys
sys.path.insert(0, {support!r})
from object_store import object_store
with object_store() as store:
    store.client().create_bucket(Bucket={bucket!r})
    print(store.direct, store.address, flush=True)
    sys.stdin.readline()
    store.weather(seed=0, latency=0.001, faults={faults!r})
    print("faults", flush=True)
    sys.stdin.read()
"""
HEADER = [
    "after", "rounds", "open files", "threads", "memory", "temporary files", "disk", "store", "unfinished uploads",
]  # fmt: skip
# By how much a figure may grow from the second cycle to the last: memory and bytes by a share.
FLAT = {
    "open files": 2, "threads": 2, "memory": 1.1, "temporary files": 0, "disk": 1.05, "store": 1.05,
    "unfinished uploads": 0,
}  # fmt: skip


@dataclass
class Counts:
    """What may grow. memory, disk and store: bytes. uploads: begun in the store and never finished."""

    seconds: float
    rounds: int
    files: int
    threads: int
    memory: int
    temporary: int
    disk: int
    store: int
    uploads: int

    def cells(self) -> list[str]:
        """A row of the table."""
        megabytes = [f"{each / 1e6:,.1f} MB" for each in (self.memory, self.disk, self.store)]
        return [
            f"{self.seconds:,.0f} s", str(self.rounds), str(self.files), str(self.threads), megabytes[0],
            str(self.temporary), *megabytes[1:], str(self.uploads),
        ]  # fmt: skip


@dataclass
class Soak:
    """The place, the expected rows, and the rounds of work on them.

    kills: of commands. again: commands that ended with an error, because of the store's faults, and were given again.
    """

    folder: Path
    manifest: Path
    direct: str
    address: str
    generator: random.Random
    started: float = field(default_factory=time.monotonic)
    rounds: int = 0
    kills: int = 0
    again: int = 0
    wrong: list[str] = field(default_factory=list)
    expected: pa.Table | None = None

    @cached_property
    def client(self) -> Any:
        """A client of the store itself. One for all rounds: boto3 keeps memory for every client that it made."""
        return s3_client(self.direct)

    def uri(self, name: str) -> str:
        """A URI in the bucket, through the faults."""
        return f"s3://{BUCKET}/{name}{s3_options(self.address)}"

    def prepare(self) -> None:
        """The images in the bucket, and the rows of an undisturbed run."""
        client = self.client
        for path in self.manifest.parent.iterdir():
            client.upload_file(str(path), BUCKET, f"in/{path.name}")
        summary = batchverify.score(self.manifest, cache=str(self.folder / "cache"), **OPTIONS)
        self.expected = summary.to_arrow().replace_schema_metadata()

    def cycle(self) -> Counts:
        """Every round once; then the counts."""
        for work in (self.on_disk, self.in_store, self.killed_on_disk, self.killed_in_store, self.look_after):
            self.persist(work)
            self.rounds += 1
        return self.counts()

    def persist(self, work: Callable[[], None]) -> None:
        """Do it, again where the store failed more often than requests are repeated."""
        for _ in range(TRIES - 1):
            try:
                work()
            except (BatchverifyError, OSError, subprocess.CalledProcessError) as exc:
                print(f"given again: {exc}", file=sys.stderr, flush=True)
                self.again += 1
            else:
                return
        work()

    def compare(self, name: str, rows: pa.Table) -> None:
        """Note a round whose rows are not the expected ones."""
        if not rows.replace_schema_metadata().equals(self.expected):
            self.wrong.append(f"{name} in round {self.rounds}")

    def on_disk(self) -> None:
        """Score in this process."""
        summary = batchverify.score(
            self.manifest, self.folder / "disk.parquet", cache=str(self.folder / "cache"), overwrite=True, **OPTIONS
        )  # fmt: skip
        self.compare("on disk", summary.to_arrow())

    def in_store(self) -> None:
        """Score in this process, everything in the bucket."""
        summary = batchverify.score(
            self.uri("in/pairs.csv"), self.uri("store.parquet"), cache=self.uri("cache"), overwrite=True, **OPTIONS
        )  # fmt: skip
        self.compare("in the store", summary.to_arrow())

    def killed_on_disk(self) -> None:
        """A command that is killed once and resumed."""
        out = self.folder / "killed.parquet"
        out.unlink(missing_ok=True)
        job = KilledJob(self.manifest, out, self.folder / "cache", PART_ROWS, pause=0.1)
        how = self.generator.choice(list(SIGNALS))
        self.kills += job.kill(how, self.generator.uniform(0, 0.05), wait_for="part")
        job.finish()
        self.compare("killed on disk", pa.concat_tables(job.table()))

    def killed_in_store(self) -> None:
        """The same with everything in the bucket."""
        client, out = self.client, "killed.parquet"
        client.delete_object(Bucket=BUCKET, Key=out)
        arguments = [
            "score",
            self.uri("in/pairs.csv"),
            "-o",
            self.uri(out),
            "--cache",
            self.uri("cache"),
            "-q",
        ]
        arguments += ["--crop", "none", "--part-rows", str(PART_ROWS), "--engine", "local", "--num-cpus", "2"]
        command = [sys.executable, "-c", program(arguments, pause=0.1)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not any("/part-" in name for name in self.objects(f"{out}.job/")):
            time.sleep(0.02)
        time.sleep(self.generator.uniform(0, 0.3))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            self.kills += 1
        process.wait()
        subprocess.run(command, check=True, timeout=300)
        location = Location.parse(self.uri(out))
        with location.filesystem.open_input_file(location.path) as file:
            self.compare("killed in the store", pq.ParquetFile(file).read())

    def look_after(self) -> None:
        """Forget some images in both caches, compact and verify them."""
        images = [path for path in self.manifest.parent.iterdir() if path.suffix == ".jpg"]
        chosen = [str(path) for path in self.generator.sample(sorted(images), FORGOTTEN)]
        for cache in (str(self.folder / "cache"), self.uri("cache")):
            erase(cache, set(keys_of(chosen).digests.values()))
            compact(cache)
            if not verify_cache(cache).ok:
                self.wrong.append(f"{cache} is damaged in round {self.rounds}")

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Names and sizes of the objects in the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", [])}

    def counts(self) -> Counts:
        """What there is now."""
        objects = self.objects()
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        names = [path.name for path in files] + [name.rpartition("/")[2] for name in objects]
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        memory = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        uploads = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return Counts(
            seconds=time.monotonic() - self.started,
            rounds=self.rounds,
            files=len(list(Path("/proc/self/fd").iterdir())),
            threads=len(list(Path("/proc/self/task").iterdir())),
            memory=int(memory.split()[1]) * 1024,
            temporary=sum(name.endswith(".tmp") or name.startswith("claim-") for name in names),
            disk=sum(path.stat().st_size for path in files),
            store=sum(objects.values()),
            uploads=len(uploads),
        )


def spoil(folder: Path, images: int) -> None:
    """Break one image in twenty: empty, cut, text, or missing."""
    for kind, number in enumerate(range(3, images, 20)):
        path = folder / f"{number}.jpg"
        data = path.read_bytes()
        if kind % 4 == 3:
            path.unlink()
        else:
            path.write_bytes((b"", data[: len(data) // 3], b"no picture")[kind % 4])


def growth(first: Counts, last: Counts) -> list[str]:
    """What grew by more than it may."""
    names = {
        "open files": "files", "threads": "threads", "memory": "memory", "temporary files": "temporary",
        "disk": "disk", "store": "store", "unfinished uploads": "uploads",
    }  # fmt: skip
    grown = []
    for name, allowed in FLAT.items():
        before, after = getattr(first, names[name]), getattr(last, names[name])
        most = before * allowed if isinstance(allowed, float) else before + allowed
        if after > most:
            grown.append(f"{name} grew from {before:,} to {after:,}")
    return grown


def main(options: argparse.Namespace) -> int:
    """Print the table; with `--record`, keep it."""
    # numba takes 110 MB once. By itself it starts after a second in numpy loops, which may be in any cycle.
    os.environ.update(KEYS, AWS_EC2_METADATA_DISABLED="true", BATCHVERIFY_KERNELS="on")
    script = STORE.format(support=SUPPORT, bucket=BUCKET, faults=FAULTS)
    with tempfile.TemporaryDirectory() as name:
        server = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        said, told = cast(IO[str], server.stdout), cast(IO[str], server.stdin)
        try:
            direct, address = said.readline().split()
            # Uploads are written here first; those of others on this machine do not count.
            scratch = Path(name) / "scratch"
            scratch.mkdir()
            os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
            images = Path(name) / "images"
            images.mkdir()
            manifest = draw_pairs(images, options.images, options.pairs)
            spoil(images, options.images)
            soak = Soak(Path(name), manifest, direct, address, random.Random(options.seed))
            soak.prepare()
            told.write("go\n")
            told.flush()
            said.readline()
            counts = work(soak, options.minutes)
        finally:
            with suppress(OSError):
                told.close()
            server.kill()
            server.wait()
    grown = growth(counts[min(1, len(counts) - 1)], counts[-1])
    every = max(1, len(counts) // 12)
    shown = [*counts[:2], *counts[2:-1:every], *counts[2:][-1:]]
    verdict = "; ".join([*soak.wrong, *grown]) or "all rows as undisturbed, nothing grew"
    if len(counts) < 3:
        verdict += " (too few cycles to say so: give more --minutes)"
    done = f"{soak.rounds} rounds, {soak.kills} kills, {soak.again} commands given again after an error of the store"
    publish(
        f"Soak of {options.minutes:g} minutes, {options.pairs:,} pairs of {options.images:,} images",
        "python benchmarks/soak.py",
        f"{table(HEADER, [each.cells() for each in shown])}\n\n{done}: {verdict}",
        record=options.record,
    )
    return int(bool(soak.wrong or grown))


def work(soak: Soak, minutes: float) -> list[Counts]:
    """Cycles until the time is over, at least one; the counts after each."""
    counts: list[Counts] = []
    while not counts or time.monotonic() - soak.started < 60 * minutes:
        counts.append(soak.cycle())
        print(json.dumps(vars(counts[-1])), file=sys.stderr, flush=True)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    sys.exit(main(parser.parse_args()))
