"""One job killed many times until it gets through: `python benchmarks/kills.py [--engine ray|cluster] [--record]`.

50,000 pairs of small pictures, the real backbone. Half of the blows fall some moments after a new segment of the
cache, half after a new part of the output: SIGKILL, SIGTERM or Ctrl-C for the driver; with Ray an actor or another
worker as well; on a cluster of three nodes (`cluster`) also a whole node, after which a new one joins. Prints what
each left, and whether the rows are those of an undisturbed run.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from results import publish, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from killing import SIGNALS, Blow, ClusterJob, KilledJob, draw_pairs

PART_ROWS = 500
# Seconds after a segment (of 128 images, half a second of work) or a part (some milliseconds).
MOMENTS = {"segment": 0.5, "part": 0.02}
KINDS: dict[str, dict[str, list[str]]] = {
    "local": {"segment": [], "part": []},
    "ray": {"segment": ["worker", "actor"], "part": ["actor"]},
    "cluster": {"segment": ["actor", "node"], "part": ["node"]},
}
HEADER = ["kill", "after a new", "by s", "images in the cache then", "parts then"]


def runs(kills: int, engine: str, generator: random.Random) -> Iterator[list[Blow]]:
    """The blows of each run of the driver; the last is the driver's own."""
    for stage, share in (("segment", kills // 2), ("part", kills - kills // 2)):
        while share:
            hows = [*KINDS[engine][stage], generator.choice(list(SIGNALS))][-share:]
            share -= len(hows)
            yield [Blow(how, round(generator.uniform(0, MOMENTS[stage]), 3), stage) for how in hows]


def state(job: KilledJob) -> list[str]:
    """What there is."""
    cached = sum(pq.read_metadata(path).num_rows for path in job.cache.rglob("data/*.parquet"))
    return [f"{cached:,}", str(job.files("part"))]


def main(options: argparse.Namespace) -> None:
    """Print the table; with `--record`, keep it."""
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        manifest = draw_pairs(folder / "images", options.images, options.pairs)
        quiet = KilledJob(manifest, folder / "quiet.parquet", folder / "quiet", PART_ROWS)
        quiet.finish()
        places = manifest, folder / "out.parquet", folder / "cache", PART_ROWS
        job = ClusterJob(*places) if options.engine == "cluster" else KilledJob(*places, engine=options.engine)
        rows = []
        for blows in runs(options.kills, options.engine, generator):
            fallen = job.run(blows)
            for blow in blows[:fallen]:
                last = state(job) if blow is blows[fallen - 1] else ["", ""]
                rows.append([blow.how, blow.wait_for, f"{blow.after:.3f}", *last])
                print(rows[-1], flush=True)
        done = job.out.exists()
        summary = job.finish()
        equal = pa.concat_tables(job.table()).equals(pa.concat_tables(quiet.table()))
        twice = job.embedded_twice()
        job.close()
    print(json.dumps(summary))
    end = (
        f"{len(job.kills)} kills, the job unfinished after the last: {not done}; rows as undisturbed: {equal}; "
        f"images of committed segments embedded twice: {twice}; parts written twice: 0 (checked after each run)"
    )
    publish(
        f"{len(job.kills)} kills over {options.pairs:,} pairs of {options.images:,} images, engine {options.engine}",
        f"python benchmarks/kills.py --engine {options.engine}",
        f"{table(HEADER, rows)}\n\n{end}",
        record=options.record,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--engine", choices=tuple(KINDS), default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
