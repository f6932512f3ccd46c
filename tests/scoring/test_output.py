"""Outputs in forbidden places, among the manifest's own files or where nothing can be written; parts and locks."""

import errno
import os
import resource
import stat
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from half_done import FACES, PART, files, job_folder, run, stopped
from repository import REPOSITORY

import batchverify
from batchverify.errors import BatchverifyError, UsageError
from batchverify.manifest.tables import would_find
from batchverify.runtime.compute_path import ComputePath
from batchverify.scoring.job_folder import JobFolder, shown_differences
from batchverify.scoring.output import Output, Parts, RowCounts
from batchverify.scoring.rows import PartRows
from batchverify.storage.location import Location

SAMPLES = REPOSITORY / "sample_manifests"


def halves(folder: Path) -> Path:
    """The sample pairs as a folder of two Parquet manifests."""
    frame = pd.read_csv(SAMPLES / "faces.csv")
    frame[:9].to_parquet(folder / "a.parquet")
    frame[9:].to_parquet(folder / "b.parquet")
    return folder


def test_a_file_system_that_cannot_sync_folders_is_written_to(monkeypatch, cache, out):
    sync, folders = os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    summary = batchverify.score(FACES, out, cache=cache, quiet=True)
    assert folders and summary.to_arrow().num_rows == summary.rows
    assert not Path(f"{out}.job").exists()


@pytest.mark.parametrize(
    ("source", "out"),
    [(".", "scores.parquet"), (".", "."), ("*.parquet", "scores.parquet"), ("**/*.parquet", "o/s.parquet")],
)
def test_an_output_that_a_rerun_would_read_as_manifest_is_refused(tmp_path, source, out):
    halves(tmp_path)
    with pytest.raises(UsageError, match="the next run would read the output as a part of the manifest"):
        batchverify.score(tmp_path / source, tmp_path / out, image_root=str(SAMPLES), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_an_output_that_a_rerun_would_not_read_is_allowed(tmp_path):
    manifests = str(tmp_path)
    manifest = tmp_path / "a.csv"
    manifest.touch()
    for source, out in (
        (manifests, "o/scores.parquet"),
        (manifests, "o/part-00000.parquet"),
        (f"{manifests}/*.csv", "scores.parquet"),
        (str(manifest), "scores.parquet"),
    ):
        assert not would_find(source, Location.parse(tmp_path / out))


def test_a_job_folder_that_cannot_be_written_is_reported(tmp_path):
    target = Output(tmp_path / "o.parquet")
    parts = Parts(target.folder.location, "token", 9)
    rows = PartRows(target, parts, {"job": {}, "token": "token"}, pa.schema([]), 9)
    with pytest.raises(BatchverifyError, match=r"o\.parquet\.job: could not be written: .*No such file"):
        rows.record_paths({ComputePath("cpu", "float32", "torch", 8)})


def test_a_part_with_another_number_of_rows_than_its_footer_states_is_not_done(tmp_path):
    rows = pa.table({"label": pa.array([0, 1, None], pa.int8())})
    parts = Parts(Location.parse(tmp_path), "token", 10)
    for number, stated in ((0, 10), (1, 3)):
        sink = parts.sink(number, rows.schema)
        sink.write(rows)
        sink.finish(parts.record(number, RowCounts(stated, 2, 1)))
    parts.find_done(13)
    assert list(parts.done) == [1]


def test_an_abandoned_writer_takes_no_rows(tmp_path):
    rows = pa.table({"label": pa.array([0, 1], pa.int8())})
    target = Output(tmp_path / "out")
    parts = Parts(Location.parse(tmp_path), "token", 4)
    writer = PartRows(target, parts, {"job": {}, "token": "token"}, rows.schema, 4)
    writer.write(0, rows)
    writer.abandon()
    with pytest.raises(BatchverifyError, match="rows came after the run was abandoned"):
        writer.write(2, rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet.gz", "scores.json"])
def test_names_of_other_formats_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"results are Parquet; give a name that ends in \.parquet"):
        Output(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_pipes_and_devices_are_no_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("o.parquet")
    for name, message in (
        ("-", "-: standard input and output cannot be read twice"),
        ("o.parquet", "o.parquet: a pipe; results go into a file or a folder"),
        ("/dev/null", "/dev/null: a device; results go into a file or a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            Output(name)
    assert [path.name for path in tmp_path.iterdir()] == ["o.parquet"]


@pytest.mark.parametrize(
    "text",
    [
        '{"job": null, "token": "x"}',
        '{"job": {}, "token": 5}',
        '{"job": {}, "token": "x", "part_rows": 0}',
        '{"job": {}, "token": "x", "part_rows": "many"}',
        '{"job": {}, "token": "x", "compute_path": []}',
        '{"job": {}, "token": "x", "token": "y"}',
        "[" * 100_000,
        "[]",
        '"job token"',
    ],
)
def test_a_damaged_job_file_is_named_and_may_be_deleted(tmp_path, text):
    state = Path(Output(tmp_path / "out.parquet").folder.location.join("job.json").path)
    state.parent.mkdir()
    state.write_text(text, encoding="utf8")
    with pytest.raises(UsageError, match=r"job\.json: not written by batchverify, or damaged; .* or delete it"):
        batchverify.score(SAMPLES / "faces.csv", tmp_path / "out.parquet", no_cache=True, quiet=True)


def test_at_most_five_differences_are_listed():
    there = dict.fromkeys("abcdefg", 1)
    text = shown_differences(there, dict.fromkeys("abcdefg", 2))
    assert text == "; ".join(f"{name}: 1 there, 2 here" for name in "abcde") + "; and 2 more"


def test_a_retry_that_fails_at_its_start_leaves_a_half_done_job_as_it_was(out, cache, tmp_path):
    frame = pd.read_csv(FACES)
    frame.loc[:: PART - 1, "image_b"] = "missing.jpg"
    frame.to_csv(tmp_path / "m.csv", index=False)
    stopped(out, cache, manifest=tmp_path / "m.csv")
    before = files(out.parent)
    assert len([name for name in before if "part-" in name]) == 2
    with pytest.raises(UsageError):
        run(out, cache, tmp_path / "m.csv", retry_failed=True, engine="ray", address="ray://x")
    assert files(out.parent) == before
    assert run(out, cache, tmp_path / "m.csv").resumed_rows == 2 * PART


def test_another_part_size_does_not_move_the_rows_of_a_job_that_is_resumed(out, cache):
    stopped(out, cache)
    assert run(out, cache, part_rows=10).resumed_rows == 2 * PART
    there, wanted = pd.read_parquet(out), pd.read_csv(FACES)
    assert there["image_a"].tolist() == wanted["image_a"].tolist()
    assert there["image_b"].tolist() == wanted["image_b"].tolist()


def test_a_truncated_part_of_a_finished_folder_is_scored_again(cache, tmp_path):
    whole = run(tmp_path / "o", cache).to_arrow()
    part = tmp_path / "o" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:50])
    summary = run(tmp_path / "o", cache)
    assert summary.resumed_rows == summary.rows - PART
    assert summary.to_arrow().equals(whole)


def test_a_full_disk_leaves_no_lock_behind(tmp_path):
    folder = JobFolder(Location.parse(tmp_path / "o"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"), folder.claimed():
            folder.write_state({"job": {}, "token": "t"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not job_folder(tmp_path / "o").exists()
    with folder.claimed():
        pass
