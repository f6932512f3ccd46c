"""Every I/O call of small commands fails once: `python benchmarks/failing.py [START...] [--record]`.

For each command, each of its calls and each fault that can befall it: the command with that fault, then the same
command undisturbed. The first must end with an error of one line that names a file, or with success; after the second
everything must be as without the fault, and nothing temporary is left. Faults on a disk: EIO, ENOSPC, EACCES, EINTR,
done but reported as failed, fewer bytes, a disk that is full from there on; in an object store: 403, 500, done but
reported as failed, an outage. Takes over an hour for all. Prints a table, and what is wrong; exits with 1 then.
"""

import argparse
import logging
import os
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
from failing_calls import DISK, EVERY, STORE, Bench, FailingCalls, Findings, fail_every_call
from failing_commands import COMMANDS
from failing_stores import IN_STORE, failing_store, store_bench

from batchverify.runtime import compiled_network

HEADER = ["command", "I/O calls", "disturbed runs", "ended with 0, 1, 2, 3", "wrong", "seconds"]
OUTPUTS = ("one.parquet", "folder")
SCORES = {f"score, {name}, {state}": (name, state) for name in OUTPUTS for state in STATES}
FAR = {f"in an object store: {name}": name for name in IN_STORE}
ALL = (*SCORES, *COMMANDS, *FAR)


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


def fail(name: str) -> tuple[Findings, float]:
    """All faults of a command, and the seconds that they took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="failing-") as place:
        folder = Path(place, "bench")
        folder.mkdir()
        with toy_embedder(Path(place, "toy.log")), bench_of(name, folder) as (bench, calls, faults):
            findings = fail_every_call(bench, calls, faults)
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
        findings, seconds = fail(name)
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
    parser.add_argument("--record", action="store_true")
    sys.exit(main(parser.parse_args()))
