"""Heads that take the mean of many faces off every embedding."""

import numpy as np
import pytest
from head_samples import KINDS, make_head, pairs, vectors
from safetensors.numpy import load, save

from batchverify.errors import ArtifactError
from batchverify.heads.centring import centred, mean_vector
from batchverify.heads.head import CENTRE, METADATA_KEY, Head, read_metadata

MEAN = (vectors(300, 9).astype(np.float32) + 0.02).mean(axis=0).astype(np.float32)


def test_the_mean_leaves_out_images_without_a_face():
    rows = vectors(50)
    rows[[3, 7]] = 0
    filled = np.delete(rows, [3, 7], axis=0).astype(np.float64)
    assert np.allclose(mean_vector(rows), filled.mean(axis=0), atol=1e-7)
    assert mean_vector(rows).dtype == np.float32


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_rows_are_moved_to_unit_length_each_by_itself(kind):
    rows = vectors(5000).astype(kind)
    rows[4] = 0
    moved = centred(rows, MEAN)
    wanted = rows.astype(np.float64) - MEAN
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    wanted[4] = 0
    assert moved.dtype == kind
    assert np.abs(moved - wanted).max() < (1e-3 if kind is np.float16 else 1e-6)
    for one in (0, 4, 4095, 4096, 4999):
        assert np.array_equal(centred(rows[one : one + 1], MEAN)[0], moved[one])
    assert np.array_equal(centred(rows[::-1], MEAN), moved[::-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_centred_head_scores_centred_vectors_and_tells_the_cosine_of_the_plain_ones(kind):
    plain, head, (a, b) = make_head(kind), make_head(kind, centre=MEAN), pairs(300)
    probability, similarity = head(a, b)
    assert np.array_equal(probability, plain(centred(a, MEAN), centred(b, MEAN))[0])
    assert np.allclose(similarity, plain(a, b)[1], atol=1e-6)
    assert not np.array_equal(probability, plain(a, b)[0])


@pytest.mark.parametrize("kind", ["distance", "linear", "network"])
def test_pairs_of_a_table_have_the_same_bits_however_large_it_is(kind):
    head, table = make_head(kind, centre=MEAN), vectors(400)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 400, (2, 900))
    whole = head.score_pairs(table, a, b)
    for rows in (slice(0, 100), slice(100, 101), slice(101, 900)):
        for part, all_of_it in zip(head.score_pairs(table, a[rows], b[rows]), whole, strict=True):
            assert np.array_equal(part, all_of_it[rows])
    for called, all_of_it in zip(head(table[a], table[b]), whole, strict=True):
        assert np.array_equal(called, all_of_it)
    assert [len(each) for each in head.score_pairs(table, a[:0], b[:0])] == [0, 0]


def test_the_centre_is_part_of_the_artifact():
    head = make_head(centre=MEAN)
    again = Head.from_bytes(head.to_bytes(), "x")
    assert again.centre is not None
    assert np.array_equal(again.centre, MEAN)
    assert again.to_bytes() == head.to_bytes()
    assert len({head.digest, make_head().digest, make_head(centre=-MEAN).digest}) == 3
    assert Head.from_bytes(make_head().to_bytes(), "x").centre is None


@pytest.mark.parametrize(
    "centre",
    [
        MEAN[:-1],
        MEAN.astype(np.float64),
        MEAN[None],
        np.full(512, np.nan, np.float32),
        np.ones(512, np.float32),
    ],
    ids=["short", "double", "matrix", "nan", "long"],
)
def test_a_centre_that_is_none_is_refused(centre):
    data = make_head().to_bytes()
    changed = save({**load(data), CENTRE: centre}, metadata={METADATA_KEY: read_metadata(data)})
    with pytest.raises(ArtifactError, match=r"^x: not a head of batchverify: its centre "):
        Head.from_bytes(changed, "x")
