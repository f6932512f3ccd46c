"""LFW View 1 for several test modules: prepared, and its test pairs scored, once a session.

Every second pair, whose images are embedded in half a minute; `BATCHVERIFY_WHOLE_LFW=1` takes all.
"""

import os
from functools import cache
from pathlib import Path

import batchverify
from batchverify.manifest.prepare import prepare_lfw
from batchverify.scoring.summary import ScoreSummary

WHOLE = os.environ.get("BATCHVERIFY_WHOLE_LFW") == "1"


@cache
def view_1(shared: Path, base: Path) -> tuple[Path, ScoreSummary]:
    """The folder of manifests, with the embeddings in its `cache`, and the first scoring of the test pairs.

    base: the session's temporary folder.
    """
    folder = base / "lfw"
    prepare_lfw(shared / "data" / "lfw", folder)
    if not WHOLE:
        thin_out(folder / "test.csv", 2)
        thin_out(folder / "train.csv", 4)
    first = batchverify.score(folder / "test.csv", folder / "test.parquet", cache=str(folder / "cache"), quiet=True)
    return folder, first


def thin_out(manifest: Path, step: int) -> None:
    """Keep every step-th row."""
    header, *rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([header, *rows[::step]]))
