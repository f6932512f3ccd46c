"""What an unfinished or damaged output must survive: failures at the start, full disks, cut files, odd names."""

import resource

import pandas as pd
import pytest
from half_done import FACES, PART, files, job_folder, run, stopped

from batchverify import output
from batchverify.errors import UsageError
from batchverify.jobfolder import JobFolder
from batchverify.storage.location import Location

pytestmark = pytest.mark.usefixtures("small_parts")


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


def test_another_part_size_of_a_later_release_moves_no_row(out, cache, monkeypatch):
    stopped(out, cache)
    for name in ("FILE_ROWS", "FOLDER_ROWS"):
        monkeypatch.setattr(output, name, 10)
    assert run(out, cache).resumed_rows == 2 * PART
    there, wanted = pd.read_parquet(out), pd.read_csv(FACES)
    assert there["image_a"].tolist() == wanted["image_a"].tolist()
    assert there["image_b"].tolist() == wanted["image_b"].tolist()


def test_a_cut_part_of_a_finished_folder_is_done_again(cache, tmp_path):
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
            folder.keep({"job": {}, "token": "t"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not job_folder(tmp_path / "o").exists()
    with folder.claimed():
        pass
