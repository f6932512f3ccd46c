"""Whether fine-tuning helped: areas against scikit-learn, intervals over people, sentences."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from batchverify.training.finetuning.guard import FAR, Comparison, compare_backbones
from batchverify.training.finetuning.sets import LabelledImages


def people_pairs(people: int, images: int, seed: int = 0) -> LabelledImages:
    """Pairs among `images` images of each of `people` people: same ones, and as many different ones."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(people, dtype=np.int32), images)
    a, b = np.triu_indices(len(who), 1)
    labels = (who[a] != who[b]).astype(np.int8)
    same, other = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    rows = np.concatenate([same, rng.choice(other, len(same), replace=False)])
    return LabelledImages(a[rows].astype(np.int32), b[rows].astype(np.int32), labels[rows], who, "dev")


def vectors(pairs: LabelledImages, noise: float, seed: int = 1) -> np.ndarray:
    """Unit vectors near those of their people."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(int(pairs.people.max()) + 1, 16))
    rows = centres[np.maximum(pairs.people, 0)] + noise * rng.normal(size=(len(pairs.people), 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_areas_and_rates_are_those_of_scikit_learn():
    pairs = people_pairs(40, 4)
    backbones = vectors(pairs, 1.5), vectors(pairs, 1.0)
    found = compare_backbones(pairs, *backbones)
    for area, tar, rows in zip(
        (found.frozen, found.tuned), (found.frozen_tar, found.tuned_tar), backbones, strict=True
    ):
        cosines = (rows[pairs.a] * rows[pairs.b]).sum(axis=1)
        assert area == pytest.approx(roc_auc_score(pairs.labels == 0, cosines), abs=1e-6)
        false, true, _ = roc_curve(pairs.labels == 0, cosines, drop_intermediate=False)
        assert tar == pytest.approx(true[false <= FAR].max(), abs=1e-9)
    assert found.helped and found.low is not None and found.low > 0
    assert found.sentence("dev").startswith("Fine-tuning helped: dev AUC ")


def test_what_people_differ_in_by_chance_is_no_help():
    pairs = people_pairs(12, 3)
    rows = vectors(pairs, 1.0)
    rng = np.random.default_rng(5)
    moved = rows + 0.01 * rng.normal(size=rows.shape).astype(np.float32)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    found = compare_backbones(pairs, rows, moved)
    assert found.low is None or found.low <= 0
    assert not found.helped


def test_people_are_drawn_if_they_are_named_and_images_otherwise():
    pairs = people_pairs(10, 4)
    backbones = vectors(pairs, 1.5), vectors(pairs, 1.4, seed=2)
    nobody = np.full(len(pairs.people), -1, np.int32)
    unnamed = LabelledImages(pairs.a, pairs.b, pairs.labels, nobody, "dev")
    by_people, by_images = compare_backbones(pairs, *backbones), compare_backbones(unnamed, *backbones)
    assert (by_people.unit, by_images.unit) == ("identities", "images")
    assert (by_people.low, by_people.high) != (by_images.low, by_images.high)


@pytest.mark.parametrize(
    ("tuned", "low", "words"),
    [
        (0.95, 0.01, "Fine-tuning helped"),
        (0.95, -0.01, "may not have helped (the difference is within chance"),
        (0.95, None, "Fine-tuning helped"),
        (0.90, -0.1, "did not help; use the parent"),
    ],
)
def test_the_verdict_says_plainly_what_it_found(tuned, low, words):
    high = None if low is None else 0.1
    sentence = Comparison(0.91, tuned, 0.5, 0.6, low, high, "images").sentence("dev")
    assert words in sentence and f"{tuned:.5f} fine-tuned" in sentence
    assert ("interval" in sentence) == (low is not None)
