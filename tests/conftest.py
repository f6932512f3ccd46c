"""Shared fixtures: where the real weights and faces lie."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real weights and faces, or a skip that says how to supply it."""
    folder = Path(os.environ.get("BATCHVERIFY_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no real weights and faces at {folder}; set BATCHVERIFY_SHARED")
    return folder.resolve()
