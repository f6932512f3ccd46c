"""Every I/O call of small commands fails once: `python benchmarks/failing.py [START...] [--keep FOLDER] [--record]`.

For each command, each of its calls and each fault that can befall it: the command with that fault, then the same
command undisturbed. The first must end with an error of one line that names a file, or with success; after the second
everything must be as without the fault, and nothing temporary is left. Faults on a disk: EIO, ENOSPC, EACCES, EINTR,
done but reported as failed, fewer bytes, a disk that is full from there on; in an object store: 403, 500, done but
reported as failed, an outage. Takes hours for all: with `--keep`, another start makes only what is missing. Prints a
table, and what is wrong; exits with 1 then.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from results import publish, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import failing_calls
from compiled_once import CompilingCore
from failing_benches import STATES, score_bench, toy_embedder
from failing_calls import DISK, EVERY, STORE, Bench, FailingCalls, Findings, Kept, fail_every_call
from failing_commands import COMMANDS
from failing_stores import IN_STORE, failing_store, store_bench

from batchverify.runtime import compiled_network

HEADER = ["command", "I/O calls", "disturbed runs", "ended with 0, 1, 2, 3", "wrong", "seconds"]
OUTPUTS = ("one.parquet", "folder")
SCORES = {f"score, {name}, {state}": (name, state) for name in OUTPUTS for state in STATES}
FAR = {f"in an object store: {name}": name for name in IN_STORE}
ALL = (*SCORES, *COMMANDS, *FAR)


class KeptRuns(dict[tuple[int, str], tuple[int, list[str]]]):
    """The runs of a command so far, see `failing_calls.Kept`, in a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        lines = file.read_text(encoding="utf8").splitlines() if file.exists() else []
        super().__init__(((number, fault), (code, wrong)) for number, fault, code, wrong in map(json.loads, lines))
        self.file = file

    def __setitem__(self, key: tuple[int, str], value: tuple[int, list[str]]) -> None:
        super().__setitem__(key, value)
        with self.file.open("a", encoding="utf8") as file:
            file.write(json.dumps([*key, *value]) + "\n")


def kept_runs(folder: Path | None, name: str) -> Kept:
    """Where the runs of a command are kept: a file of its own in the folder, or nowhere."""
    if folder is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    return KeptRuns(folder / f"{re.sub('[^a-z-]+', '_', name)}.jsonl")


@contextmanager
def bench_of(name: str, folder: Path) -> Iterator[tuple[Bench, FailingCalls, tuple[str, ...]]]:
    """A command's bench, what makes its calls fail, and its faults."""
    far = name in FAR
    with failing_calls.failing_calls(folder, stores=far) as calls:
        if not far:
            bench = score_bench(folder, *SCORES[name]) if name in SCORES else COMMANDS[name](folder)
            yield bench, calls, DISK
            return
        with failing_store(folder.parent) as store:
            yield store_bench(folder, FAR[name], store), calls, STORE


def fail(name: str, kept: Kept) -> tuple[Findings, float]:
    """All faults of a command, and the seconds that they took. kept: the runs that were made before."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="failing-") as place:
        folder = Path(place, "bench")
        folder.mkdir()
        with toy_embedder(Path(place, "toy.log")), bench_of(name, folder) as (bench, calls, faults):
            findings = fail_every_call(bench, calls, faults, kept=kept)
    return findings, time.monotonic() - started


def main(options: argparse.Namespace) -> int:
    """Print the table; with `--record`, keep it."""
    os.environ[EVERY] = "1"
    # The store's.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    setattr(compiled_network, "core", cache(partial(CompilingCore, compiled_network.core())))  # noqa: B010
    torch.set_num_threads(1)
    rows, wrong = [], []
    for name in [name for name in ALL if name.startswith(tuple(options.starts) or "")]:
        findings, seconds = fail(name, kept_runs(options.keep, name))
        codes = ", ".join(str(findings.runs[code]) for code in range(4))
        counts = [f"{findings.calls.total():,}", f"{findings.runs.total():,}"]
        rows.append([f"`{name}`", *counts, codes, str(len(findings.wrong)), f"{seconds:.0f}"])
        print(
            time.strftime("%H:%M:%S"),
            *rows[-1],
            *findings.wrong,
            sep="\n" if findings.wrong else "  ",
            flush=True,
        )
        wrong += findings.wrong
    total = sum(int(row[2].replace(",", "")) for row in rows)
    said = f"{total:,} disturbed runs, each followed by an undisturbed one; wrong: {len(wrong)}"
    publish(
        "Every I/O call failed once",
        " ".join(["python benchmarks/failing.py", *map(repr, options.starts)]),
        f"{table(HEADER, rows)}\n\n{said}",
        record=options.record,
    )
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("starts", nargs="*", help="only commands whose names begin with one of these")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep what each run showed, and make no run again"
    )
    parser.add_argument("--record", action="store_true")
    sys.exit(main(parser.parse_args()))
