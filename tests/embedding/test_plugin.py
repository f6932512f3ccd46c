"""Backbones of other packages: found by their entry points, tried out, and used like our own."""

from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from installed_plugins import install_plugins

from batchverify.embedding.backbone import find_spec, list_backbones, load_backbone
from batchverify.embedding.embedder import Embedder
from batchverify.errors import ArtifactError, BatchverifyError, UsageError

CODE = """
    import numpy as np

    class Mean:
        fingerprint = "1.0"
        size = 96
        dimension = 75
        crop = "none"

        def load(self, device):
            assert device == "cpu"
            return lambda pixels: pixels[:, 8::20, 8::20].reshape(len(pixels), -1)[:, :75] + 1.0

    class Other(Mean):
        fingerprint = "2.0"

    class Small(Mean):
        size = "96"

    class Empty:
        size = 96

    class Wrong(Mean):
        def load(self, device):
            return lambda pixels: pixels.mean(axis=(1, 2))

    class Lost(Mean):
        def load(self, device):
            raise OSError("no such weights")

    class Constant(Mean):
        def load(self, device):
            return lambda pixels: np.ones((len(pixels), 75))

    class Aligned(Mean):
        crop, template = "align", "arcface"

    class Astray(Aligned):
        template = "mine"

    def broken():
        raise RuntimeError("not today")
"""
NAMES = (
    "Mean",
    "Other",
    "Small",
    "Empty",
    "Wrong",
    "Lost",
    "Constant",
    "Aligned",
    "Astray",
    "broken",
    "absent",
)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch) -> None:
    """An installed package with many plug-ins."""
    (tmp_path / "faces_of_others.py").write_text(dedent(CODE))
    install_plugins(tmp_path, {name.lower(): f"faces_of_others:{name}" for name in NAMES})
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_plugin_is_a_backbone_like_any_other():
    embedder = Embedder("mean", device="cpu")
    assert embedder.settings.crop == "none" and embedder.fingerprint.document["size"] == 96
    assert find_spec("mean").dimension == embedder.fingerprint.dimension == 75
    assert str(embedder.compute_path) == "cpu own plugin, batches of 32"
    images = [np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8) for seed in range(3)]
    found = embedder(images)
    expected = np.stack([image[8::20, 8::20].ravel()[:75] + 1.0 for image in images])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-6)
    assert found.skipped == [None] * 3


def test_its_own_fingerprint_and_crop_count():
    assert find_spec("mean").fingerprint != find_spec("other").fingerprint
    settings = find_spec("aligned").defaults
    assert (settings.crop, settings.template, settings.detector) == ("align", "arcface", "retinaface")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "small",
            r"faces_of_others:Small\): ValueError: size must be a whole number from 32 to 512, got '96'",
        ),
        ("empty", "AttributeError: .*dimension"),
        ("astray", "template must be one of .*, got 'mine'"),
        ("broken", "RuntimeError: not today"),
        ("absent", "AttributeError: .*absent"),
        ("lost", "OSError: no such weights"),
        ("wrong", r"its self-check failed: .*vectors \(32, 3\), not \(32, 75\)"),
        ("constant", "its self-check failed: two different faces have the same vector"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said(name, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        Embedder(name, device="cpu")
    assert name in str(caught.value)


def test_options_that_a_plugin_does_not_have_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--dtype float16: the plug-in 'mean' chooses it itself"):
        Embedder("mean", device="cpu", dtype="float16")
    with pytest.raises(UsageError, match="--weights goes with"):
        load_backbone("mean", tmp_path)


def test_plugins_are_listed_and_not_run():
    listed = {each.name: each for each in list_backbones()}
    assert listed["broken"].note == "a plug-in, faces_of_others:broken"
    assert listed["mean"].fingerprint is None


def test_a_plugin_that_fails_later_ends_the_run_with_its_name():
    embedder = Embedder("mean", device="cpu")
    embedder._network._function = lambda pixels: 1 / 0
    with pytest.raises(BatchverifyError, match="backbone 'mean': ZeroDivisionError: division by zero"):
        embedder.vectors(np.zeros((1, 96, 96, 3), np.uint8))
