"""Whole jobs in an object store with faults and kills give the rows of a local run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import draw_pairs, program
from object_store import Store, impatience, object_store
from repository import REPOSITORY

import batchverify
from batchverify.storage.location import Location
from batchverify.storage.temporary import temporary_name

FOLDER = REPOSITORY / "sample_manifests"
OPTIONS: dict[str, Any] = {"crop": "none", "quiet": True, "device": "cpu"}
# With this seed the first job meets each kind of fault, and one slow answer, which is retried.
SEED = 0


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as store:
        store.client().create_bucket(Bucket="weather")
        yield store


def upload(store: Store, folder: Path, prefix: str) -> str:
    """The files of a folder in the bucket; returns their URI with a gap, through the proxy."""
    for path in folder.rglob("*"):
        if path.is_file():
            store.client().upload_file(str(path), "weather", f"{prefix}/{path.relative_to(folder)}")
    return f"s3://weather/{prefix}/{{}}{store.options()}"


def keys(store: Store, prefix: str) -> list[str]:
    listed = store.client().list_objects_v2(Bucket="weather", Prefix=prefix).get("Contents", [])
    return [each["Key"] for each in listed]


def rows_of(uri: str) -> pa.Table:
    location = Location.parse(uri)
    with location.filesystem.open_input_file(location.path) as file:
        return pq.ParquetFile(file).read().replace_schema_metadata()


def test_despite_faults_all_rows_come_back_and_are_scored(store: Store, tmp_path: Path) -> None:
    local = batchverify.score(FOLDER / "faces.csv", tmp_path / "o.parquet", no_cache=True, **OPTIONS)
    uri = upload(store, FOLDER, "bad")
    weather = store.weather(seed=SEED, slow=4.5, faults={"500": 0.02, "503": 0.02, "slow": 0.01})
    with impatience(request_seconds=4):
        far = batchverify.score(
            uri.format("faces.csv"), uri.format("o.parquet"), cache=uri.format("cache"), **OPTIONS
        )
    assert (far.rows, far.failed) == (local.rows, 0)
    assert far.to_arrow().replace_schema_metadata().equals(local.to_arrow().replace_schema_metadata())
    assert all(weather.done[kind] for kind in ("500", "503", "slow")), weather.done
    weather = store.weather(seed=SEED, faults={"500": 0.02, "503": 0.02, "reset": 0.01})
    again = batchverify.score(uri.format("faces.csv"), uri.format("parts"), cache=uri.format("cache"), **OPTIONS)
    assert (again.embedded, again.failed) == (0, 0)
    assert again.to_arrow().replace_schema_metadata().equals(local.to_arrow().replace_schema_metadata())


def test_images_that_cannot_be_read_are_rows_with_reasons(store: Store) -> None:
    uri = upload(store, FOLDER, "some")
    names = sorted(path.name for path in (FOLDER / "faces").iterdir())
    store.weather(poisoned={names[0]: "503", names[1]: "403"})
    with impatience(attempts=2):
        summary = batchverify.score(uri.format("faces.csv"), uri.format("o.parquet"), no_cache=True, **OPTIONS)
    table = summary.to_arrow()
    for side in ("a", "b"):
        pairs = zip(table[f"image_{side}"].to_pylist(), table[f"error_{side}"].to_pylist(), strict=True)
        expected = {names[0]: "unreadable", names[1]: "forbidden"}
        assert all(error == expected.get(Path(image).name) for image, error in pairs)
    assert 0 < summary.failed < summary.rows


def command(uri: str, *more: str) -> list[str]:
    arguments = ["score", uri.format("pairs.csv"), "-o", uri.format("o.parquet"), "--part-rows", "200"]
    arguments += ["--crop", "none", "--cache", uri.format("cache"), "--engine", "local", "--device", "cpu"]
    arguments += ["-q", *more]
    return [sys.executable, "-c", program(arguments, pause=0.2)]


def test_a_job_with_its_output_in_the_bucket_is_killed_resumed_and_overwritten(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    manifest = draw_pairs(folder, 30, 2000)
    expected = batchverify.score(manifest, tmp_path / "o.parquet", no_cache=True, **OPTIONS).to_arrow()
    uri = upload(store, folder, "job")
    store.weather(latency=0.02)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(command(uri), start_new_session=True, env=environment)
    deadline = time.monotonic() + 60
    while not keys(store, "job/o.parquet.job/part-00002") and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parts = [key for key in keys(store, "job/o.parquet.job/") if "/part-" in key]
    assert 3 <= len(parts) < 10 and not keys(store, "job/o.parquet/")
    weather = store.weather()
    # What was being written when the process was killed; another file is left where there was none.
    (scratch / temporary_name("part-00009.parquet")).touch()
    done = subprocess.run(command(uri), capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []
    written = {request.split()[1].partition("?")[0] for request in weather.came if request.startswith("PUT")}
    assert not [key for key in parts if f"/weather/{key}" in written]
    assert rows_of(uri.format("o.parquet")).equals(expected.replace_schema_metadata())
    assert keys(store, "job/o.parquet.job") == []

    weather = store.weather()
    options: dict[str, Any] = {**OPTIONS, "cache": uri.format("cache"), "engine": "local"}
    batchverify.score(uri.format("pairs.csv"), uri.format("o.parquet"), **options)
    assert not any(request.startswith(("PUT", "POST")) for request in weather.came), "a finished job is left alone"
    (folder / "3.jpg").rename(folder / "2.jpg")
    store.client().upload_file(str(folder / "2.jpg"), "weather", "job/2.jpg")
    retried = batchverify.score(uri.format("pairs.csv"), uri.format("o.parquet"), retry_failed=True, **options)
    errors = expected["error_a"].to_pylist() + expected["error_b"].to_pylist()
    table = retried.to_arrow()
    assert "not_found" in errors
    assert "not_found" not in table["error_a"].to_pylist() + table["error_b"].to_pylist()
    anew = batchverify.score(uri.format("pairs.csv"), uri.format("o.parquet"), overwrite=True, **options)
    assert anew.to_arrow().replace_schema_metadata().equals(table.replace_schema_metadata())


def test_two_runs_on_one_output_in_a_bucket(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    manifest = draw_pairs(folder, 30, 2000)
    expected = batchverify.score(manifest, tmp_path / "o.parquet", no_cache=True, **OPTIONS).to_arrow()
    uri = upload(store, folder, "two")
    store.weather()
    first = subprocess.Popen(command(uri), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not keys(store, "two/o.parquet.job/part-") and time.monotonic() < deadline:
        time.sleep(0.1)
    # Asleep it still holds the output; awake it might be done before the others have started.
    os.kill(first.pid, signal.SIGSTOP)
    for more in ([], ["--overwrite"]):
        second = subprocess.run(command(uri, *more), capture_output=True, text=True, timeout=100)
        assert second.returncode == 2
        assert f"another run is writing this output (process {first.pid} on " in second.stderr
    os.kill(first.pid, signal.SIGCONT)
    _, said = first.communicate(timeout=100)
    assert first.returncode == 0, said
    assert rows_of(uri.format("o.parquet")).equals(expected.replace_schema_metadata())
    assert keys(store, "two/o.parquet.job") == []
