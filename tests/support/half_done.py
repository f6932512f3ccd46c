"""Jobs over the sample faces that stop half way, for the tests of what comes after."""

from pathlib import Path

import pytest
from repository import REPOSITORY

import batchverify
from batchverify.errors import BatchverifyError

SAMPLES = REPOSITORY / "sample_manifests"
FACES = SAMPLES / "faces.csv"
PART = 17


def run(out: Path, cache: str, manifest: Path = FACES, root: Path = SAMPLES, *, part_rows: int = PART, **options):
    """`score` in small parts: a job of many parts in little time."""
    options |= {"cache": cache, "image_root": root, "part_rows": part_rows, "quiet": True}
    return batchverify.score(manifest, out, **options)


def stopped(out: Path, cache: str, parts: int = 2, **options) -> Path:
    """A job that failed after some parts: a folder is in the way of the next. Returns where its parts lie."""
    folder = job_folder(out) if out.suffix else out
    in_the_way = folder / f"part-{parts:05d}.parquet"
    in_the_way.mkdir(parents=True)
    with pytest.raises(BatchverifyError, match="could not be written") as caught:
        run(out, cache, **options)
    assert caught.value.exit_code == 1
    in_the_way.rmdir()
    return folder


def job_folder(out: Path) -> Path:
    return out.with_name(out.name + ".job")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
