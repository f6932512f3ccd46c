"""No cell of a CSV file that we write is a formula, and every path still names its file."""

import csv
import os

import pyarrow.parquet as pq
import pytest
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.errors import UsageError
from batchverify.manifest.manifest import Manifest
from batchverify.manifest.prepare import prepare_folders
from batchverify.manifest.spreadsheet import FORMULA, safe_name, safe_path

EVIL = ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(1)", "\t=1", '=HYPERLINK("http://x")']


@pytest.mark.parametrize("text", EVIL)
def test_formulas_become_text(text):
    assert safe_path(text) == f"./{text}"
    assert safe_name(text) == f"'{text}"


@pytest.mark.parametrize("text", ["a.jpg", "../=a.jpg", "/=a.jpg", "./=a.jpg", "s3://b/=", "", "'a", "1-2"])
def test_other_cells_stay_as_they_are(text):
    assert safe_path(text) == safe_name(text) == text


def rows(path) -> list[dict[str, str]]:
    with open(path, encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def formulas(path) -> list[str]:
    return [cell for row in rows(path) for cell in row.values() if cell.startswith(FORMULA)]


def test_what_prepare_writes_holds_no_formula_and_is_read_back(tmp_path):
    people = [*(name.replace("/", "") for name in EVIL[:4]), "plain", "other"]
    for person in people:
        for shot in range(2):
            (tmp_path / person).mkdir(exist_ok=True)
            (tmp_path / person / f"={shot}.jpg").write_bytes(b"x")
    # The manifests lie beside the images, so that paths start with the names of people.
    prepared = prepare_folders(tmp_path, tmp_path, pairs={"test": 20})
    manifest = prepared.manifests["test"]
    assert formulas(manifest) == []
    opened = Manifest.open(manifest)
    images = set(opened.scan().images)
    assert images == {str(path) for path in tmp_path.glob("*/*.jpg")}
    assert {row["person_a"] for row in rows(manifest)} <= {safe_name(person) for person in people}


def test_two_people_are_never_written_as_one(tmp_path):
    for person in ("=a", "'=a", "b", "c"):
        (tmp_path / person).mkdir()
        for shot in range(2):
            (tmp_path / person / f"{shot}.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="'=a and =a are both written as '=a: rename one of them"):
        prepare_folders(tmp_path, tmp_path / "out", pairs={"test": 20})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_worst_pairs_hold_no_formula(tmp_path, suffix):
    cells = [EVIL[row % len(EVIL)] for row in range(60)]
    columns = draw_columns(60, image_a=cells, person_a=cells)
    scores = write_scores(tmp_path / "s.parquet", columns)
    batchverify.evaluate(scores, draws=0, export_worst=(60, str(tmp_path / f"worst.{suffix}")))
    images = set(Manifest.open(tmp_path / f"worst.{suffix}").scan().images)
    assert images >= {os.path.normpath(tmp_path / cell) for cell in EVIL}
    if suffix == "csv":
        assert formulas(tmp_path / "worst.csv") == []
    else:
        assert set(pq.read_table(tmp_path / "worst.parquet")["person_a"].to_pylist()) == set(EVIL)
