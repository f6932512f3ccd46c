"""What an unfinished or damaged output must survive: failures at the start, full disks, cut files, odd names."""

import resource
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPOSITORY

import batchverify
from batchverify import output
from batchverify.errors import BatchverifyError, UsageError
from batchverify.jobfolder import JobFolder
from batchverify.locations import Location

SAMPLES = REPOSITORY / "sample_manifests"
FACES = SAMPLES / "faces.csv"
PART = 17


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("cache"))
    batchverify.embed(FACES, cache=folder, quiet=True)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of a few rows: a job of many parts in little time."""
    monkeypatch.setattr(output, "FILE_ROWS", PART)
    monkeypatch.setattr(output, "FOLDER_ROWS", PART)


@pytest.fixture(params=["one.parquet", "folder"])
def out(request, tmp_path) -> Path:
    """An output's path: a file and a folder."""
    return tmp_path / "o" / request.param


def run(out: Path, cache: str, manifest: Path = FACES, **options):
    return batchverify.score(manifest, out, cache=cache, quiet=True, image_root=str(SAMPLES), **options)


def job_folder(out: Path) -> Path:
    return out.with_name(out.name + ".job")


def stopped(out: Path, cache: str, parts: int = 2, **options) -> Path:
    """A job that failed after some parts: a folder is in the way of the next. Returns where its parts lie."""
    folder = job_folder(out) if out.suffix else out
    in_the_way = folder / f"part-{parts:05d}.parquet"
    in_the_way.mkdir(parents=True)
    with pytest.raises(BatchverifyError, match="could not be written"):
        run(out, cache, **options)
    in_the_way.rmdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in paths}


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
