"""Shared fixtures: where the real weights and faces lie."""

import os
import shutil
from pathlib import Path

import pytest
from repository import REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real weights and faces, or a skip that says how to supply it."""
    folder = Path(os.environ.get("BATCHVERIFY_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no real weights and faces at {folder}; set BATCHVERIFY_SHARED")
    return folder.resolve()


@pytest.fixture(scope="session")
def embedded_samples(tmp_path_factory) -> Path:
    """A cache that holds the sample faces: to be copied, not to be written to."""
    import batchverify

    folder = tmp_path_factory.mktemp("embedded") / "cache"
    batchverify.embed(REPOSITORY / "sample_manifests" / "faces.csv", cache=str(folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def cache(embedded_samples, tmp_path_factory) -> str:
    """A cache that holds the sample faces, one a test file."""
    return shutil.copytree(embedded_samples, str(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(params=["one.parquet", "folder"])
def out(request, tmp_path) -> Path:
    """An output's path: a file and a folder."""
    return tmp_path / "o" / request.param
