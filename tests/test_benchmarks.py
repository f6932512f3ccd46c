"""The table of backbones, made small: by the command line, from the manifests that come with the project."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from benchmark_modules import benchmark_module
from repository import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
SAMPLES = REPOSITORY / "sample_manifests"


@pytest.fixture
def backbones():
    """The benchmark as a module."""
    with benchmark_module("backbones") as module:
        yield module


def test_every_way_gets_a_row(tmp_path):
    """View 1 and the other set are both the drawn faces; the paths lead from their folders to the pictures."""
    folder = tmp_path / "lfw"
    folder.mkdir()
    shutil.copytree(SAMPLES / "faces", folder / "faces")
    shutil.copy(SAMPLES / "faces.csv", folder / "test.csv")
    command = [sys.executable, str(BENCHMARKS / "backbones.py"), "--lfw", str(folder), "--images", "30"]
    command += ["--fiw", str(SAMPLES / "faces.csv"), "--way", "compact:retinaface", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    header, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines()[:3])
    cells = dict(zip(header[2:], row[2:], strict=True))
    assert row[:2] == ["compact, retinaface", "shipped"] and len(header) == len(row)
    assert float(cells["MB of weights"]) < 6 and float(cells["images/s"]) > 0
    assert 0.5 < float(cells["View 1 test AUC"]) <= 1 and 0 <= float(cells["TAR at FAR 0.001"]) <= 1
    assert cells["no face, FIW"].startswith("0 of ")
    assert "show two people" in done.stdout


def test_what_cannot_be_scored_ends_it_with_the_reason(tmp_path):
    shutil.copy(SAMPLES / "faces.csv", tmp_path / "test.csv")
    command = [sys.executable, str(BENCHMARKS / "backbones.py"), "--lfw", str(tmp_path), "--way", "unknown"]
    done = subprocess.run(
        [*command, "--fiw", str(SAMPLES / "faces.csv")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "failed: batchverify: " in done.stderr and "unknown" in done.stderr


def test_ways_name_a_backbone_and_perhaps_a_detector(backbones):
    way = backbones.Way.parse
    assert way("compact:retinaface").options == ["--backbone", "compact", "--detector", "retinaface"]
    assert way("/a/b.onnx").options == ["--backbone", "/a/b.onnx"]
    assert way("vggface2+/a/b.onnx").name == "vggface2+b.onnx"
    both = backbones.megabytes(way("vggface2+compact"))
    assert both == pytest.approx(sum(map(backbones.megabytes, (way("vggface2"), way("compact")))))


def test_true_accepts_are_counted_below_the_least_of_the_different(backbones):
    labels = np.repeat([0, 1], [4, 100])
    probability = np.concatenate([[0.1, 0.2, 0.3, 0.4], [0.25, 0.35], np.linspace(0.5, 1, 98)])
    assert backbones.true_accepts(labels, probability, 1e-3) == 0.5
    # One of a hundred may lie below the threshold.
    assert backbones.true_accepts(labels, probability, 1e-2) == 0.75


@pytest.mark.parametrize(("most", "rows"), [(None, 52), (30, 13), (8, 4)])
def test_copied_pairs_are_spread_over_the_manifest(backbones, tmp_path, most, rows):
    pairs = backbones.copied(SAMPLES / "faces.csv", tmp_path / "copy.csv", most)
    lines = pairs.path.read_text().splitlines()
    assert len(lines) == rows + 1 and pairs.root == SAMPLES / "faces"
    assert str(SAMPLES / "faces" / "chen_2.jpg") in lines[1]
