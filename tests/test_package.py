"""What the wheel carries, and that its parts agree."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import REPOSITORY

from batchverify.embedding.backbone import load_backbone, packaged_weights
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.heads.head import default_head


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """The files of a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        REPOSITORY / "batchverify", folder / "batchverify", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    arguments = ["wheel", "-q", "--no-deps", "-w", str(folder), str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_carries_modules_types_weights_heads_and_licences(names):
    sources = {f"batchverify/{path.name}" for path in (REPOSITORY / "batchverify").glob("*.py")}
    data = {f"batchverify/weights/{path.name}" for path in packaged_weights().parent.iterdir()}
    assert len(data) >= 11
    data |= {f"batchverify/page/{path.name}" for path in (REPOSITORY / "batchverify" / "page").iterdir()}
    assert sources | data | {"batchverify/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "jobs/", "benchmarks/"))]
    licences = {Path(name).name for name in names if ".dist-info/" in name and "LICENSE" in name}
    assert licences == {"LICENSE", "LICENSE-facenet"}


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
