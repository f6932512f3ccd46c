"""Every I/O call of `score` fails once: an error of one line or success, and the same command then does the rest."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from failing_benches import ScoreBench, toy_embedder
from failing_calls import DISK, STORE, fail_every_call, failing_calls
from object_store import Store, impatience, object_store

from batchverify.cache.maintenance import verify_cache
from batchverify.storage.location import Location


@pytest.mark.parametrize(
    ("name", "state", "step"),
    [
        ("one.parquet", "cold", 9),
        ("folder", "cold", 9),
        ("one.parquet", "half done", 17),
        ("folder", "half done", 17),
        ("one.parquet", "finished", 1),
        ("folder", "finished", 1),
        ("one.parquet", "--retry-failed", 17),
        ("folder", "--retry-failed", 17),
        ("one.parquet", "--overwrite", 17),
        ("folder", "--overwrite", 17),
    ],
)
def test_any_call_of_a_job_may_fail(tmp_path: Path, name: str, state: str, step: int) -> None:
    bench = ScoreBench(tmp_path, name)
    with toy_embedder(tmp_path.parent / "toy.log"), failing_calls(tmp_path) as calls:
        if state == "half done":
            bench.template = half_done(bench)
        elif state != "cold":
            bench.template = finished(bench)
        bench.options = (state,) if state.startswith("--") else ()
        findings = fail_every_call(bench, calls, DISK, step=step)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)


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


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as store:
        store.client().create_bucket(Bucket="calls")
        yield store


class StoreBench(ScoreBench):
    """The same with cache and output in an object store."""

    def __init__(self, folder: Path, name: str, store: Store) -> None:
        super().__init__(folder, name)
        self.store = store

    def uri(self, place: Path, name: str) -> str:
        """Of something in the bucket, behind the run's prefix."""
        return f"s3://calls/{self.name}/{place.name}/{name}{self.store.options(self.store.direct)}"

    def arguments(self, place: Path) -> list[str]:
        arguments = super().arguments(place)
        names = {str(place / "cache"): "cache", str(place / "out" / self.name): f"out/{self.name}"}
        return [self.uri(place, names[each]) if each in names else each for each in arguments]

    def outcome(self, place: Path, result: Result) -> Any:
        output = Location.parse(self.uri(place, f"out/{self.name}"))
        rows = []
        for file, _ in output.parent.files() if output.suffix else output.files():
            if file.suffix == ".parquet":
                with file.filesystem.open_input_file(file.path) as source:
                    rows += pq.ParquetFile(source).read().to_pylist()
        done = bool(output.suffix) or output.join("_SUCCESS").kind() == "file"
        report = verify_cache(self.uri(place, "cache"))
        return result.exit_code, rows if done else None, report.ok, report.foreign

    def leftovers(self, place: Path) -> list[str]:
        prefix = f"{self.name}/{place.name}/"
        listed = self.store.client().list_objects_v2(Bucket="calls", Prefix=prefix).get("Contents", [])
        names = [each["Key"] for each in listed]
        # What could not be sent is kept on this machine, but for parts that are sent again.
        names += [path.name for path in Path(tempfile.gettempdir()).iterdir() if path.suffix]
        useless = (".tmp", ".job/") if self.name == "folder" else (".tmp", ".job/", "-part-0")
        return [name for name in names if any(each in name for each in useless)]


@pytest.mark.parametrize(("name", "step"), [("one.parquet", 16), ("folder", 32)])
def test_any_call_to_an_object_store_may_fail(
    tmp_path: Path, store: Store, name: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = StoreBench(tmp_path, name, store)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with (
        toy_embedder(tmp_path.parent / "toy.log"),
        impatience(attempts=1),
        failing_calls(tmp_path, stores=True) as calls,
    ):
        findings = fail_every_call(bench, calls, STORE, step=step)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
