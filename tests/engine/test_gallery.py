"""The gallery of vectors and reasons."""

import random

import numpy as np
import pyarrow as pa
import pytest

from batchverify.engine.gallery import Gallery, Owners
from batchverify.errors import BatchverifyError
from batchverify.records import Reason, Skipped


def filled() -> Gallery:
    """Images 0 and 3 have vectors, 1 and 2 failed, 4 is pending."""
    gallery = Gallery(5)
    gallery.put(0, np.full(512, 0.5, np.float16))
    gallery.fail(1, Skipped(Reason.NO_FACE, "no face here"))
    gallery.fail(2, Skipped(Reason.NOT_FOUND, "no such file"))
    gallery.put(3, np.full(512, -0.25, np.float16))
    return gallery


def test_what_is_known():
    gallery = filled()
    assert [gallery.known(index) for index in range(5)] == [True, True, True, True, False]
    assert gallery.vectors[[0, 3], 7].tolist() == [0.5, -0.25]
    assert not gallery.vectors[[1, 2, 4]].any()


def test_pairs_with_two_vectors_are_usable():
    a, b = np.array([0, 0, 1, 2, 3, 4]), np.array([3, 1, 3, 1, 3, 0])
    assert filled().usable(a, b).tolist() == [True, False, False, False, True, False]


def test_reasons_are_those_of_the_records():
    gallery = filled()
    assert gallery.reasons(np.array([0, 1, 2, 3, 1])).to_pylist() == [
        None,
        "no_face",
        "not_found",
        None,
        "no_face",
    ]
    for index, reason in enumerate(Reason):
        every = Gallery(len(Reason))
        every.fail(index, Skipped(reason))
        assert every.reasons(np.array([index])).to_pylist() == [reason.value]


def test_failures_are_counted_by_reason():
    gallery = filled()
    gallery.fail(4, Skipped(Reason.NO_FACE))
    assert gallery.failures() == {"not_found": 1, "no_face": 2}
    assert Gallery(3).failures() == {}


def test_a_copy_brings_vector_reason_and_message():
    gallery = filled()
    gallery.copy(0, 4)
    assert gallery.usable(np.array([4]), np.array([4])).all()
    assert np.array_equal(gallery.vectors[4], gallery.vectors[0])
    gallery.copy(1, 4)
    assert gallery.reasons(np.array([4])).to_pylist() == ["no_face"]
    assert not gallery.vectors[4].any()


def test_an_image_lost_sight_of_is_an_error():
    gallery = filled()
    with pytest.raises(BatchverifyError, match="1 images were lost sight of"):
        gallery.require_complete()
    gallery.fail(4, Skipped(Reason.CRASHED))
    gallery.require_complete()


def test_many_vectors_lie_in_a_mapped_file_that_leaves_nothing(tmp_path, monkeypatch):
    plain = Gallery(5)
    monkeypatch.setattr("batchverify.engine.gallery.MAPPED_BYTES", 4 * 1024)
    mapped = Gallery(5, str(tmp_path))
    assert isinstance(mapped.vectors.base, np.memmap) and plain.vectors.base is None
    for gallery in (plain, mapped):
        gallery.put(3, np.full(512, 0.5, np.float16))
    assert np.array_equal(plain.vectors, mapped.vectors)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BatchverifyError, match=r"no room for \d+\.\d GB of vectors"):
        Gallery(1 << 43, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_reasons_of_finished_rows_are_taken_over():
    gallery = Gallery(4)
    gallery.restore(np.array([0, 2, 3]), pa.array(["no_face", None, "crashed"]))
    assert gallery.reasons(np.array([0, 3])).to_pylist() == ["no_face", "crashed"]
    assert [gallery.known(index) for index in range(4)] == [True, False, False, True]
    gallery.require_complete(np.array([0, 3]))
    with pytest.raises(BatchverifyError, match="1 images were lost"):
        gallery.require_complete(np.array([0, 2]))


@pytest.mark.parametrize("seed", range(5))
def test_owners_are_those_of_a_dict(seed):
    generator, count = random.Random(seed), 300
    # Many want one place, some differ in the kept half's last byte alone, some hold zeros.
    keys = [
        bytes([generator.randrange(3)]) + bytes(14) + bytes([at % 256]) + generator.randbytes(16)
        if at % 2
        else generator.randbytes(32)
        for at in range(count)
    ]
    keys = list({key[:16]: key for key in keys}.values())
    owners, slow = Owners(len(keys)), {}
    for _ in range(6000):
        at = generator.randrange(len(keys))
        key = keys[at]
        assert owners.get(key) == slow.get(key, -1)
        if generator.random() < 0.2:
            owners.drop(key)
            slow.pop(key, None)
        elif key not in slow:
            owners.put(key, at)
            slow[key] = at
    assert [owners.get(key) for key in keys] == [slow.get(key, -1) for key in keys]


def test_another_image_may_own_a_key_that_was_dropped():
    owners, keys = Owners(3), [bytes([1]) * 32, bytes([1]) * 8 + bytes(24)]
    owners.put(keys[0], 2)
    owners.put(keys[1], 0)
    owners.drop(keys[0])
    assert [owners.get(key) for key in keys] == [-1, 0]
    owners.put(keys[0], 1)
    assert [owners.get(key) for key in keys] == [1, 0]


def test_a_run_without_images_has_no_owners():
    assert Owners(0).get(bytes(32)) == -1
