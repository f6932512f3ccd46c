"""`batchverify evaluate` from process start to exit: `python benchmarks/evaluate.py [--pairs N] [--record]`.

Its time, its peak memory and the size of the report, without pictures. Scores are drawn at random, as `score` writes
them: a million pairs with 200 draws over people, the same by camera, the same with ten groups of people and
a quality, and ten million without intervals.
"""

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from results import publish, table
from score import run

from batchverify.scoring.parquet import RECORD_KEY

THRESHOLD = 0.5
CAMERAS = np.array([f"camera {each}" for each in range(8)])
GROUPS = np.array([f"group {each}" for each in range(10)])
FAILED = 0.01
GROUP_OPTIONS = ("--group-a", "group_a", "--group-b", "group_b")
QUALITY_OPTIONS = ("--quality", "sharpness")
# Rows drawn and written at once.
BITE = 1_000_000


def draw(pairs: int, people: int, rng: np.random.Generator) -> pa.Table:
    """So many scored pairs of so many people, half of them different, as an output of `score`."""
    truth = rng.integers(0, 2, pairs).astype(np.int8)
    a = rng.integers(0, people, pairs)
    b = np.where(truth == 0, a, (a + rng.integers(1, people, pairs)) % people)
    similarity = np.clip(rng.normal(0.7 - 0.6 * truth, 0.13), -1, 1).astype(np.float32)
    probability = (1 / (1 + np.exp(12 * (similarity.astype(np.float64) - 0.45)))).astype(np.float32)
    lost = rng.random(pairs) < FAILED
    names = pa.array([f"person {each:06}" for each in range(people)])
    shots = [pa.array([f"/pictures/{each:06}/{shot}.jpg" for each in range(people)]) for shot in (0, 1)]
    return pa.table(
        {
            "image_a": shots[0].take(pa.array(a)),
            "image_b": shots[1].take(pa.array(b)),
            "true_label": pa.array(truth),
            "person_a": names.take(pa.array(a)),
            "person_b": names.take(pa.array(b)),
            "camera": pa.array(CAMERAS[rng.integers(0, len(CAMERAS), pairs)]),
            "group_a": pa.array(GROUPS[a % len(GROUPS)]),
            "group_b": pa.array(GROUPS[b % len(GROUPS)]),
            "sharpness_a": pa.array(rng.random(pairs, np.float32)),
            "sharpness_b": pa.array(rng.random(pairs, np.float32)),
            "probability": pa.array(probability, mask=lost),
            "label": pa.array((probability >= np.float32(THRESHOLD)).astype(np.int8), mask=lost),
            "similarity": pa.array(similarity, mask=lost),
            "status": pa.array(np.where(lost, "no_face", "ok")),
            "error_a": pa.array(np.where(lost, "no_face", ""), mask=~lost),
            "error_b": pa.nulls(pairs, pa.string()),
        }
    )


def write(path: Path, pairs: int, people: int) -> Path:
    """Scores of so many pairs, with a run record."""
    rng = np.random.default_rng(0)
    record = json.dumps({"threshold": THRESHOLD, "options": {}, "manifest": ["/pictures/pairs.csv"]})
    writer = None
    for start in range(0, pairs, BITE):
        drawn = draw(min(BITE, pairs - start), people, rng)
        writer = writer or pq.ParquetWriter(path, drawn.schema)
        writer.write_table(drawn)
    if writer is not None:
        writer.add_key_value_metadata({RECORD_KEY: record})
        writer.close()
    return path


def measure(name: str, scores: Path, pairs: int, *arguments: str) -> list[str]:
    """A row of the table: the command on these scores, in a process of its own."""
    output = scores.parent / "out"
    options = ["-o", str(output), "--no-images", "-q", *arguments]
    done = run("-m", "batchverify.cli", "evaluate", str(scores), *options)
    size = (output / "report.html").stat().st_size / 1e6
    row = [name, f"{pairs:,}", f"{done.seconds:.1f}", f"{done.megabytes:,.0f}", f"{size:.1f}"]
    print(row, flush=True)
    return row


@click.command(help=__doc__)
@click.option("--pairs", default=1_000_000, show_default=True, help="With intervals.")
@click.option("--most", default=10_000_000, show_default=True, help="Without.")
@click.option("--people", default=20_000, show_default=True, help="Whom the pairs share.")
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
def main(pairs: int, most: int, people: int, record: bool) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        few = write(Path(folder) / "few.parquet", pairs, people)
        many = write(Path(folder) / "many.parquet", most, people)
        rows = [
            measure("200 draws over people", few, pairs),
            measure("200 draws over people, --by camera", few, pairs, "--by", "camera"),
            measure("200 draws over people, 10 groups", few, pairs, *GROUP_OPTIONS),
            measure("200 draws over people, 10 groups, --quality", few, pairs, *GROUP_OPTIONS, *QUALITY_OPTIONS),
            measure("--draws 0", many, most, "--draws", "0"),
        ]
    header = ["run", "pairs", "seconds", "peak MB of its process", "report MB"]
    command = f"python benchmarks/evaluate.py --pairs {pairs} --most {most} --people {people}"
    publish(f"Evaluate, {pairs:,} and {most:,} pairs", command, table(header, rows), record=record)


if __name__ == "__main__":
    main()
