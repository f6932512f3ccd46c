"""LFW View 1 for several test modules: prepared, and its test pairs scored, once a session."""

from functools import cache
from pathlib import Path

import batchverify
from batchverify.manifest.prepare import prepare_lfw
from batchverify.scoring.summary import ScoreSummary


@cache
def view_1(shared: Path, base: Path) -> tuple[Path, ScoreSummary]:
    """The folder of manifests, with the embeddings in its `cache`, and the first scoring of the test pairs.

    base: the session's temporary folder.
    """
    folder = base / "lfw"
    prepare_lfw(shared / "data" / "lfw", folder)
    first = batchverify.score(
        folder / "test.csv", folder / "test.parquet", cache=str(folder / "cache"), quiet=True
    )
    return folder, first
