"""In which rows of an output images appear."""

from pathlib import Path

import pytest
from repository import REPOSITORY

import batchverify
from batchverify.errors import ManifestError
from batchverify.evaluation.scores import find_appearances

FOLDER = REPOSITORY / "sample_manifests"


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_rows_that_name_an_image_are_counted(tmp_path: Path, name: str) -> None:
    summary = batchverify.score(
        FOLDER / "faces.csv", tmp_path / name, no_cache=True, crop="none", quiet=True, device="cpu"
    )
    table = summary.to_arrow()
    sides = list(zip(table["image_a"].to_pylist(), table["image_b"].to_pylist(), strict=True))
    chosen = {sides[0][0], sides[5][1]}
    images = [str(FOLDER / image) for image in chosen] + [str(FOLDER / "faces" / "nobody.jpg")]
    found = find_appearances(str(tmp_path / name), images)
    assert (found.rows, found.images) == (sum(bool(chosen & set(pair)) for pair in sides), len(chosen))
    assert found.rows > 1


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        find_appearances(str(tmp_path / "absent.parquet"), [])
