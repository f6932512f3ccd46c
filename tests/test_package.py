"""What the wheel carries, and that its parts agree."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import PACKAGE, REPOSITORY

from batchverify.embedding.backbone import load_backbone
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.heads.head import default_head


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """The files of a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "batchverify", folder / "batchverify", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    arguments = ["wheel", "-q", "--no-deps", "-w", str(folder), str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_carries_modules_types_weights_heads_and_licences(names):
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert len([path for path in files if path.suffix == ".py"]) > 80
    assert len([path for path in files if path.parent.name == "weights"]) >= 11
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= names
    assert not [name for name in names if name.startswith(("tests/", "jobs/", "benchmarks/"))]
    licences = {Path(name).name for name in names if ".dist-info/" in name and "LICENSE" in name}
    assert licences == {"LICENSE", "LICENSE-compact", "LICENSE-facenet", "LICENSE-retinaface"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"tta": "flip"}, {"crop": "center"}, {"crop": "none"}],
    ids=["detect", "flip", "center", "none"],
)
def test_a_head_is_shipped_for_each_promised_setting(settings):
    embedding = EmbeddingFingerprint.of(load_backbone().fingerprint, EmbeddingSettings(**settings))
    head = default_head(embedding)
    assert head.embedding.id == embedding.id
    assert 0 < head.threshold() < 1


@pytest.mark.weights
@pytest.mark.parametrize("settings", [{}, {"tta": "flip"}, {"crop": "center"}, {"crop": "none"}])
def test_a_head_is_shipped_for_the_float_weights_too(settings, shared):
    backbone = load_backbone("vggface2-float", shared / "weights")
    embedding = EmbeddingFingerprint.of(backbone.fingerprint, EmbeddingSettings(**settings))
    assert default_head(embedding).embedding.id == embedding.id
