"""A stopped job is resumed: finished parts stay, missing ones are scored, and other jobs are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from half_done import FACES, PART, SAMPLES, files, job_folder, run, stopped
from run_records import read_record

import batchverify
from batchverify.errors import NothingScoredError, UsageError
from batchverify.scoring.job_folder import JobFolder
from batchverify.storage.location import Location

ROWS = len(pd.read_csv(FACES))


def part_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every part file."""
    stats = {path.name: path.stat() for path in sorted(folder.glob("part-*.parquet"))}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in stats.items()}


def test_a_finished_job_touches_nothing(out, cache):
    first = run(out, cache)
    before = files(out.parent)
    again = run(out, cache)
    assert files(out.parent) == before
    assert not job_folder(out).exists()
    assert (again.embedded, again.cached, again.resumed_rows, again.rows) == (0, 0, ROWS, ROWS)
    assert (again.scored, again.different, again.threshold) == (
        first.scored,
        first.different,
        first.threshold,
    )
    assert again.to_arrow().equals(first.to_arrow())


def test_a_stopped_job_is_finished_and_its_parts_are_not_scored_again(out, cache, tmp_path):
    undisturbed = run(tmp_path / f"other{out.suffix}", cache).to_arrow()
    folder = stopped(out, cache)
    before = part_files(folder)
    assert len(before) == 2
    assert (job_folder(out) / "job.json").exists()
    if not out.suffix:
        summary = run(out, cache)
        assert dict(list(part_files(folder).items())[:2]) == before
    else:
        assert not out.exists()
        summary = run(out, cache)
    assert summary.resumed_rows == 2 * PART
    assert summary.rows == summary.scored == ROWS
    assert summary.unique_images == 24 == summary.cached + summary.resumed
    assert summary.to_arrow().equals(undisturbed)
    assert not job_folder(out).exists()
    record = read_record(str(out)) if out.suffix else json.loads((out / "_SUCCESS").read_text())
    assert (record["rows"], record["scored"], record["resumed_rows"]) == (ROWS, ROWS, 2 * PART)


def test_a_resumed_file_equals_an_undisturbed_one_except_for_its_run_record(cache, tmp_path):
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    run(one, cache)
    stopped(other, cache, parts=3)
    run(other, cache)
    for a, b in zip(*(pq.ParquetFile(path).metadata.to_dict()["row_groups"] for path in (one, other)), strict=True):
        assert a == b
    assert pq.read_table(one).equals(pq.read_table(other))


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"threshold": 0.25}, r"threshold: 0\.\d+ there, 0\.25 here"),
    ({"limit": 20}, "limit: None there, 20 here"),
    ({"max_megapixels": 50.0}, r"max_megapixels: 100\.0 there, 50\.0 here"),
    ({"crop": "none"}, r"embedding\.crop\.mode: detect there, none here"),
]


@pytest.mark.parametrize(("options", "message"), DIFFERENT, ids=[next(iter(each[0])) for each in DIFFERENT])
def test_another_job_is_refused_with_the_difference(out, cache, options, message):
    for start in (stopped, run):
        start(out, cache)
        before = files(out.parent)
        with pytest.raises(UsageError, match=message) as caught:
            run(out, cache, **options)
        assert "--overwrite" in str(caught.value)
        assert caught.value.exit_code == 2
        assert files(out.parent) == before


def test_another_manifest_is_refused_and_overwrite_starts_anew(out, cache, tmp_path):
    stopped(out, cache)
    frame = pd.read_csv(FACES)
    frame[:30].to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UsageError, match="manifest: different content"):
        run(out, cache, tmp_path / "other.csv")
    summary = run(out, cache, tmp_path / "other.csv", overwrite=True)
    assert (summary.rows, summary.resumed_rows) == (30, 0)
    assert summary.to_arrow().num_rows == 30
    assert not job_folder(out).exists()


def test_a_finished_output_stays_whole_until_the_new_one_replaces_it(cache, tmp_path):
    out = tmp_path / "one.parquet"
    run(out, cache)
    before = out.read_bytes()
    stopped(out, cache, threshold=0.25, overwrite=True)
    assert out.read_bytes() == before
    # Without the option the overwriting job is resumed; with it, it would start anew.
    assert run(out, cache, threshold=0.25).resumed_rows == 2 * PART
    assert read_record(str(out))["threshold"] == 0.25


def test_files_of_others_are_never_overwritten(cache, tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "mine.parquet")
    (tmp_path / "spark").mkdir()
    (tmp_path / "spark" / "_SUCCESS").write_bytes(b"")
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "j.parquet.job").mkdir()
    (tmp_path / "j.parquet.job" / "job.json").write_text("{}")
    before = files(tmp_path)
    for name in ("mine.parquet", "spark", "text.parquet", "j.parquet"):
        with pytest.raises(UsageError, match="not written by batchverify"):
            run(tmp_path / name, cache, overwrite=True)
    assert files(tmp_path) == before


def test_part_files_without_their_job_folder_are_refused(cache, tmp_path):
    stopped(tmp_path / "o", cache)
    shutil.rmtree(tmp_path / "o.job")
    with pytest.raises(UsageError, match=r"its job folder .*o\.job is gone; start anew with --overwrite"):
        run(tmp_path / "o", cache)
    assert run(tmp_path / "o", cache, overwrite=True).resumed_rows == 0


def test_a_part_that_was_removed_is_scored_again(cache, tmp_path):
    whole = run(tmp_path / "o", cache).to_arrow()
    (tmp_path / "o" / "part-00001.parquet").unlink()
    summary = run(tmp_path / "o", cache)
    assert summary.resumed_rows == ROWS - PART
    assert summary.to_arrow().equals(whole)


def test_a_damaged_part_is_scored_again(cache, tmp_path):
    whole = run(tmp_path / "w.parquet", cache).to_arrow()
    folder = stopped(tmp_path / "o.parquet", cache)
    (folder / "part-00001.parquet").write_bytes((folder / "part-00001.parquet").read_bytes()[:-9])
    summary = run(tmp_path / "o.parquet", cache)
    assert summary.resumed_rows == PART
    assert summary.to_arrow().equals(whole)


def test_two_runs_at_once_on_one_output(out, cache):
    folder = JobFolder(Location.parse(out))
    with (
        folder.claimed(),
        pytest.raises(UsageError, match=rf"another run is writing this output \(process {os.getpid()} on"),
    ):
        run(out, cache)
    assert not job_folder(out).exists()
    run(out, cache)


def broken_manifest(folder: Path) -> Path:
    """Pairs of the sample faces, of which one image is missing at first."""
    (folder / "faces").mkdir()
    frame = pd.read_csv(FACES)
    for name in {*frame["image_a"], *frame["image_b"]}:
        shutil.copy(SAMPLES / name, folder / name)
    frame.to_csv(folder / "pairs.csv", index=False)
    (folder / "faces" / "ada_1.jpg").unlink()
    return folder / "pairs.csv"


@pytest.mark.parametrize("parts", [2, 0], ids=["half done", "finished"])
def test_retry_failed_does_the_failed_parts_again_and_keeps_the_others(out, cache, tmp_path, parts):
    manifest = broken_manifest(tmp_path)

    def again(**options):
        return run(out, cache, manifest, root=tmp_path, **options)

    if parts:
        stopped(out, cache, parts, manifest=manifest, root=tmp_path)
    else:
        assert again().failed_rows > 0
    shutil.copy(SAMPLES / "faces" / "ada_1.jpg", tmp_path / "faces")
    # An image that failed in finished rows also fails in the missing ones, as in a run that was not stopped.
    failed = again()
    status = failed.to_pandas()
    assert failed.failed_rows == (status["status"] == "not_found").sum() > 0
    assert failed.failures == {"not_found": 1}
    before = part_files(out)
    summary = again(retry_failed=True)
    assert (summary.failed_rows, summary.failures) == (0, {})
    good = [part for part in range(-(-ROWS // PART)) if (status["status"][part * PART :][:PART] == "ok").all()]
    assert 0 < len(good) < -(-ROWS // PART)
    assert summary.resumed_rows == sum(len(status[part * PART :][:PART]) for part in good)
    if not out.suffix:
        after = part_files(out)
        assert [number for number, name in enumerate(before) if before[name] == after[name]] == good
    assert (
        summary.to_arrow()
        .select(["probability"])
        .equals(run(out.with_name("w.parquet"), cache).to_arrow().select(["probability"]))
    )
    assert again(retry_failed=True).resumed_rows == ROWS


def test_a_rerun_of_a_failed_run_fails_again(out, cache, tmp_path):
    for _ in range(2):
        with pytest.raises(NothingScoredError, match="not_found 24") as caught:
            batchverify.score(FACES, out, cache=cache, quiet=True, image_root=str(tmp_path))
    assert caught.value.summary.resumed_rows == ROWS


def half_done_on(out: Path, cache: str, path: str) -> None:
    """A half-done job whose vectors were computed on `path`."""
    stopped(out, cache)
    state = json.loads((job_folder(out) / "job.json").read_text())
    assert "compute_path" not in state  # everything came from the cache
    (job_folder(out) / "job.json").write_text(json.dumps({**state, "compute_path": path}))


def test_a_resumed_job_keeps_its_compute_path(cache, tmp_path):
    path = "cpu float32 torch, batches of 8"
    out, empty = tmp_path / "o.parquet", str(tmp_path / "c")
    half_done_on(out, cache, path)
    with pytest.raises(UsageError, match="--batch-size 16: this job was started with 8"):
        run(out, empty, batch_size=16)
    summary = run(out, empty, device="cpu")
    assert (summary.compute_path, summary.embedded > 0) == (path, True)
    assert read_record(str(out))["compute_path"] == path
    assert batchverify.score(FACES, no_cache=True, quiet=True).compute_path != path


def test_other_options_than_those_of_the_compute_path_are_refused(cache, tmp_path):
    out, empty = tmp_path / "o.parquet", str(tmp_path / "c")
    half_done_on(out, cache, "cpu float32 torch, batches of 8")
    for name, value, earlier in (("runtime", "openvino", "torch"), ("dtype", "int8", "float32")):
        options: dict[str, Any] = {"device": "cpu", name: value}
        with pytest.raises(
            UsageError, match=f"--{name} {value}: this job was started with {earlier}; omit the option"
        ):
            run(out, empty, **options)


@pytest.mark.parametrize("path", ["cuda float16 torch, batches of 8", "cpu float32 winograd, batches of 32"])
def test_a_job_of_another_device_or_an_older_version_is_refused(path, cache, tmp_path):
    half_done_on(tmp_path / "o.parquet", cache, path)
    with pytest.raises(UsageError, match=rf"'{path}', here they would be on 'cpu .*--overwrite"):
        run(tmp_path / "o.parquet", str(tmp_path / "empty"), device="cpu")
    assert (tmp_path / "o.parquet.job" / "part-00001.parquet").exists()
    # Without new vectors there is nothing to compare.
    assert run(tmp_path / "o.parquet", cache, device="cpu").resumed_rows == 2 * PART


def test_leftovers_of_a_run_killed_while_cleaning_up_are_removed(out, cache):
    run(out, cache)
    record = read_record(str(out)) if out.suffix else json.loads((out / "_SUCCESS").read_text())
    job_folder(out).mkdir()
    (job_folder(out) / "job.json").write_text(json.dumps({"job": record["job"], "token": record["token"]}))
    (job_folder(out) / ".part-00000.parquet.12345678.tmp").write_bytes(b"half")
    assert run(out, cache).resumed_rows == ROWS
    assert not job_folder(out).exists()


@pytest.mark.parametrize("left", [["part-00003.parquet", "lock"], ["lock"], []])
def test_leftovers_of_a_run_killed_after_the_state_was_removed(out, cache, left):
    run(out, cache)
    job_folder(out).mkdir()
    for name in left:
        (job_folder(out) / name).write_bytes(b"whatever")
    assert run(out, cache).resumed_rows == ROWS
    assert not job_folder(out).exists()


def test_only_images_of_missing_parts_are_looked_up(cache, tmp_path):
    frame = pd.read_csv(FACES)
    few = frame[frame["image_a"].str.contains("ada|ben") & frame["image_b"].str.contains("ada|ben")][:5]
    pd.concat([frame[:PART], few]).to_csv(tmp_path / "m.csv", index=False)
    stopped(tmp_path / "o.parquet", cache, parts=1, manifest=tmp_path / "m.csv")
    summary = run(tmp_path / "o.parquet", str(tmp_path / "empty"), tmp_path / "m.csv")
    names = {*few["image_a"], *few["image_b"]}
    assert summary.embedded == len(names) < summary.unique_images
    assert summary.resumed == summary.unique_images - len(names)
    assert summary.scored == PART + len(few)
