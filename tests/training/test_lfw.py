"""The accuracy and speed of `train` on real faces: LFW View 1, default settings, five seeds.

Every fourth training pair, whose images are embedded in half a minute; `BATCHVERIFY_WHOLE_LFW=1` takes all.
"""

from typing import Any

import numpy as np
import pytest
from lfw_cache import WHOLE, view_1

import batchverify

pytestmark = pytest.mark.weights
SEEDS = 5


@pytest.mark.timeout(900)
def test_default_settings_on_view_1(shared, tmp_path_factory, tmp_path):
    folder, first = view_1(shared, tmp_path_factory.getbasetemp())
    names = {name: folder / f"{name}.csv" for name in ("train", "dev", "test")}
    options: dict[str, Any] = {
        "test": names["test"],
        "cache": folder / "cache",
        "repeats": SEEDS,
        "quiet": True,
    }
    summary = batchverify.train(names["train"], names["dev"], tmp_path / "head.safetensors", **options)
    # MTCNN finds no face in one image of the 2,048 training pairs.
    training = summary.pairs["training"] + summary.left_out
    assert training == (2048 if WHOLE else 512)
    assert summary.pairs == {
        "training": training - summary.left_out,
        "dev": 152,
        "test": 1000 if WHOLE else 500,
    }
    assert (summary.left_out <= 1, summary.leaks, first.embedded) == (True, 0, 1549 if WHOLE else 904)
    auc, f1, ece = (np.array([each["test"][name] for each in summary.metrics]) for name in ("auc", "f1", "ece"))
    print(f"View 1 test, {SEEDS} seeds: AUC {auc.mean():.5f} ± {auc.std():.6f}, F1 {f1}, ECE {ece}")
    assert len(summary.metrics) == SEEDS
    assert auc.mean() >= 0.9993 and auc.std() <= 0.0002
    assert f1.mean() >= 0.988
    assert ece.max() <= 0.015
    started = summary.seconds
    again = batchverify.train(names["train"], names["dev"], tmp_path / "again.safetensors", **options)
    assert (again.embedded, again.digest) == (0, summary.digest)
    print(f"first training {started} s, second {again.seconds} s")
