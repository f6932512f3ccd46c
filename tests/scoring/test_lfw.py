"""Accuracy on real faces: LFW View 1 test, with the packaged weights and the shipped head."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lfw_cache import WHOLE, view_1

import batchverify
from batchverify.evaluation.figures import measure

pytestmark = pytest.mark.weights
ROWS, IMAGES = (1000, 1549) if WHOLE else (500, 904)


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    return view_1(shared, tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def first(shared, tmp_path_factory):
    return view_1(shared, tmp_path_factory.getbasetemp())[1]


def scores(summary) -> pd.DataFrame:
    return summary.to_pandas()


def test_accuracy_on_view_1(folder, first):
    frame, manifest = scores(first), pd.read_csv(folder / "test.csv")
    assert (first.rows, first.scored, first.unique_images, first.embedded) == (ROWS, ROWS, IMAGES, IMAGES)
    assert frame["image_a"].tolist() == manifest["image_a"].tolist()
    assert frame["true_label"].tolist() == manifest["label"].tolist()
    metrics = measure(frame["true_label"].to_numpy(), frame["probability"].to_numpy(), first.threshold)
    print(f"View 1 test: {metrics}")
    assert metrics.auc >= 0.9990
    assert metrics.f1 >= 0.985


def test_the_same_command_again_embeds_nothing_and_gives_the_same_bytes(folder, first):
    again = batchverify.score(folder / "test.csv", folder / "again.parquet", cache=str(folder / "cache"), quiet=True)
    assert (again.embedded, again.cached) == (0, IMAGES)
    columns = ["probability", "label", "similarity", "status"]
    assert again.to_arrow().select(columns).equals(first.to_arrow().select(columns))


def test_shuffled_doubled_and_mirrored(folder, first):
    manifest = pd.read_csv(folder / "test.csv")
    mirrored = manifest.rename(columns={"image_a": "image_b", "image_b": "image_a"})
    both = pd.concat([manifest, mirrored]).sample(frac=1, random_state=0)
    both[manifest.columns].to_csv(folder / "shuffled.csv", index=False)
    summary = batchverify.score(folder / "shuffled.csv", cache=str(folder / "cache"), quiet=True)
    assert (summary.rows, summary.embedded) == (2 * ROWS, 0)
    expected = scores(first).iloc[both.index]
    for column in ("probability", "similarity"):
        assert np.array_equal(scores(summary)[column].to_numpy(), expected[column].to_numpy())


def test_both_packaged_backbones_together(folder):
    manifest = pd.read_csv(folder / "test.csv")
    manifest.groupby("label").sample(40, random_state=0).to_csv(folder / "some.csv", index=False)
    summary = batchverify.score(
        folder / "some.csv", backbone="vggface2+compact", cache=str(folder / "cache"), quiet=True
    )
    assert summary.backbones["vggface2"]["embedded"] == 0 < summary.backbones["compact"]["embedded"]
    frame = scores(summary)
    assert set(frame["backbones"]) == {"vggface2+compact"}
    assert (frame["true_label"] == frame["label"]).mean() >= 0.975
