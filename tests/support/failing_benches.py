"""Small commands over pictures of one colour, to be run hundreds of times with failing calls."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from failing_calls import Bench
from toys import ToyEmbedder, draw

from batchverify.cache.maintenance import verify_cache
from batchverify.cli.app import main
from batchverify.engine.base import WorkPlan

PEOPLE, IMAGES = 8, 3
PART_ROWS = 5
# One CPU, so that calls come in nearly the same order every time.
COMMON = ("--crop", "none", "--engine", "local", "--num-cpus", "1", "-q")


@contextmanager
def toy_embedder(log: Path) -> Iterator[None]:
    """Commands embed with the toy, which needs no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkPlan, "embedder", lambda plan, workers=1, threads=None: ToyEmbedder(log))
        yield


def draw_people(folder: Path) -> list[str]:
    """Three pictures each of people who differ by their colour; returns the names in order."""
    names = []
    for person in range(PEOPLE):
        for number in range(IMAGES):
            names.append(f"{person}_{number}.png")
            colour = (20 + person * 25, 230 - person * 25, 60 + 40 * (person % 3) + number * 3)
            draw(folder / names[-1], colour)
    return names


def write_pairs(path: Path, rows: Sequence[tuple[Any, ...]], columns: str = "image_a,image_b,row") -> Path:
    """A manifest."""
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


class ScoreBench(Bench):
    """`score` of 12 pairs, one image of which is absent and one no image, in three parts.

    name: of the output. cache: put there what it holds, else nothing. options: more of them.
    """

    # What a row says of an image whose reading failed.
    blamed: tuple[str, ...] = ("unreadable",)

    def __init__(self, folder: Path, name: str, *options: str, template: Path | None = None) -> None:
        super().__init__(folder)
        self.name, self.options, self.template = name, options, template
        names = draw_people(folder / "in")[:7]
        (folder / "in" / names[5]).write_text("no picture")
        (folder / "in" / names[6]).unlink()
        pairs = [(names[row % 7], names[(row * 3 + 1) % 7], row) for row in range(12)]
        self.manifest = write_pairs(folder / "in" / "pairs.csv", pairs)

    def furnish(self, place: Path) -> None:
        if self.template is not None:
            shutil.copytree(self.template, place, dirs_exist_ok=True)

    def arguments(self, place: Path) -> list[str]:
        where = ["-o", str(place / "out" / self.name), "--cache", str(place / "cache")]
        return ["score", str(self.manifest), *where, "--part-rows", str(PART_ROWS), *COMMON, *self.options]

    def outcome(self, place: Path, result: Result) -> Any:
        """The rows, and whether the cache is whole."""
        rows = rows_of(place / "out" / self.name)
        report = verify_cache(str(place / "cache"))
        return result.exit_code, None if rows is None else rows.to_pylist(), report.ok, report.foreign

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """An image that could not be read is a row that says so, and all other rows are as ever."""
        name, table = Path(hit[1]).name, rows_of(place / "out" / self.name)
        if not name.endswith(".png") or table is None:
            return False
        return all(
            row == as_ever
            or (
                name in (row["image_a"], row["image_b"])
                and (row["error_a"] in self.blamed or row["error_b"] in self.blamed)
                and row["status"] != "ok"
            )
            for row, as_ever in zip(table.to_pylist(), expected[1], strict=True)
        )

    def mend(self, place: Path, hit: tuple[str, str]) -> None:
        """Rows with an image that could not be read are not tried again by themselves."""
        if hit[1].endswith(".png"):
            CliRunner().invoke(main, [*self.arguments(place), "--retry-failed"])


def rows_of(output: Path) -> pa.Table | None:
    """The rows of an output, without the run record; None if it is not finished."""
    if output.suffix:
        return pq.ParquetFile(output).read().replace_schema_metadata() if output.exists() else None
    if not (output / "_SUCCESS").exists():
        return None
    parts = [pq.ParquetFile(part).read() for part in sorted(output.glob("part-*.parquet"))]
    return pa.concat_tables(parts).replace_schema_metadata()


def half_done(bench: ScoreBench) -> Path:
    """A job that failed after its first part: a folder is in the way of the second."""
    place = bench.place()
    output = place / "out" / bench.name
    parts = output if not output.suffix else output.with_name(output.name + ".job")
    in_the_way = parts / "part-00001.parquet"
    in_the_way.mkdir(parents=True)
    result = bench.invoke(place)
    assert (result.exit_code, len(list(parts.glob("part-*.parquet")))) == (1, 2), result.output
    in_the_way.rmdir()
    return place


def finished(bench: ScoreBench) -> Path:
    """An output that is finished."""
    place = bench.place()
    assert bench.invoke(place).exit_code == 0
    return place


# What a job finds: nothing, a job half done, a finished one; or a finished one that is given again with this option.
STATES = ("cold", "half done", "finished", "--retry-failed", "--overwrite")


def score_bench(folder: Path, name: str, state: str) -> ScoreBench:
    """A bench of `score` in one of `STATES`."""
    bench = ScoreBench(folder, name)
    if state != "cold":
        bench.template = half_done(bench) if state == "half done" else finished(bench)
    bench.options = (state,) if state.startswith("--") else ()
    return bench
