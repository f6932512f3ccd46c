"""Other backbones than the default one, from the command line to the rows: `compact`, and an ONNX file."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from onnx_files import expected, weights, write_model
from PIL import Image
from repository import REPOSITORY

from batchverify.cli.app import main
from batchverify.faces.crops import fixed_face
from batchverify.heads.head import Head

FACES = REPOSITORY / "sample_manifests" / "faces.csv"
DESCRIPTION = {"crop": "center", "size": 64, "colour": "BGR", "mean": 120, "scale": 60}


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of 100 numbers a face of 64 pixels, as a link to a file without a suffix, as hubs keep them."""
    folder = tmp_path_factory.mktemp("model")
    path = write_model(folder / "own.onnx", DESCRIPTION, size=64, dimension=100)
    path.rename(folder / "blob")
    path.symlink_to("blob")
    return path


def test_an_onnx_file_goes_through_every_command(model, tmp_path):
    common = ["--backbone", model, "--cache", tmp_path / "cache"]
    head, out = tmp_path / "head.safetensors", tmp_path / "scores.parquet"
    assert "no head is shipped" in run("score", FACES, "-o", out, *common, code=2)
    header, *lines = FACES.read_text().splitlines()
    for name, part in (("train", lines[::2]), ("dev", lines[1::2])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *part]))
    train = ["train", tmp_path / "train.csv", "--dev", tmp_path / "dev.csv", "--image-root", FACES.parent]
    run(*train, "-o", head, "--algorithm", "logistic", *common)
    assert Head.load(head).dimension == 100
    run("score", FACES, "-o", out, "--head", head, *common)
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 52 and {row["status"] for row in rows} == {"ok"}
    vectors = {}
    for name in {row[side] for row in rows for side in ("image_a", "image_b")}:
        face = fixed_face(np.asarray(Image.open(FACES.parent / name).convert("RGB")), "center", 64).pixels
        vectors[name] = expected(face[None], weights(100), "BGR", 120, 60)[0]
    for row in rows:
        assert abs(row["similarity"] - vectors[row["image_a"]] @ vectors[row["image_b"]]) < 2e-3
    assert "24" in run("cache", "verify", "--cache", tmp_path / "cache")
    first, second = (FACES.parent / rows[0][side] for side in ("image_a", "image_b"))
    told = run("predict", "-i1", first, "-i2", second, "--head", head, "--json", *common)
    assert abs(json.loads(told)["similarity"] - rows[0]["similarity"]) < 1e-3
    run("evaluate", out, "-o", tmp_path / "report", "--draws", 0, "--cache", tmp_path / "cache")
    other = [*common, "--crop", "none"]
    assert "trained for other embeddings: crop" in run("score", FACES, "-o", out, "--head", head, *other, code=2)


def test_a_file_without_a_description_ends_with_one_to_fill_in(model, tmp_path):
    path = tmp_path / "bare.onnx"
    path.write_bytes(model.read_bytes())
    told = run("embed", FACES, "--backbone", path, "--cache", tmp_path / "cache", code=2)
    assert f"batchverify: {path}: no description" in told and '"colour": null' in told


def test_compact_needs_no_other_option(tmp_path):
    out = tmp_path / "scores.parquet"
    run("score", FACES, "-o", out, "--backbone", "compact", "--cache", tmp_path / "cache")
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 52 and {row["status"] for row in rows} == {"ok"}
    right = sum(row["label"] == row["true_label"] for row in rows)
    assert right > 26, "sample faces are drawings: better than chance is all that counts"
