"""The table of vectors and reasons."""

import random

import numpy as np
import pyarrow as pa
import pytest

from batchverify.engine.embedding_table import ContentIndex, EmbeddingTable
from batchverify.errors import BatchverifyError
from batchverify.records import Reason, Skipped


def filled() -> EmbeddingTable:
    """Images 0 and 3 have vectors, 1 and 2 failed, 4 is pending."""
    embeddings = EmbeddingTable(5)
    embeddings.put(0, np.full(512, 0.5, np.float16))
    embeddings.fail(1, Skipped(Reason.NO_FACE, "no face here"))
    embeddings.fail(2, Skipped(Reason.NOT_FOUND, "no such file"))
    embeddings.put(3, np.full(512, -0.25, np.float16))
    return embeddings


def test_what_is_known():
    embeddings = filled()
    assert [embeddings.known(index) for index in range(5)] == [True, True, True, True, False]
    assert embeddings.vectors[[0, 3], 7].tolist() == [0.5, -0.25]
    assert not embeddings.vectors[[1, 2, 4]].any()


def test_pairs_with_two_vectors_are_usable():
    a, b = np.array([0, 0, 1, 2, 3, 4]), np.array([3, 1, 3, 1, 3, 0])
    assert filled().usable(a, b).tolist() == [True, False, False, False, True, False]


def test_reasons_are_those_of_the_records():
    embeddings = filled()
    assert embeddings.reasons(np.array([0, 1, 2, 3, 1])).to_pylist() == [
        None,
        "no_face",
        "not_found",
        None,
        "no_face",
    ]
    for index, reason in enumerate(Reason):
        every = EmbeddingTable(len(Reason))
        every.fail(index, Skipped(reason))
        assert every.reasons(np.array([index])).to_pylist() == [reason.value]


def test_failures_are_counted_by_reason():
    embeddings = filled()
    embeddings.fail(4, Skipped(Reason.NO_FACE))
    assert embeddings.failures() == {"not_found": 1, "no_face": 2}
    assert EmbeddingTable(3).failures() == {}


def test_a_copy_brings_vector_reason_and_message():
    embeddings = filled()
    embeddings.copy(0, 4)
    assert embeddings.usable(np.array([4]), np.array([4])).all()
    assert np.array_equal(embeddings.vectors[4], embeddings.vectors[0])
    embeddings.copy(1, 4)
    assert embeddings.reasons(np.array([4])).to_pylist() == ["no_face"]
    assert not embeddings.vectors[4].any()


def test_an_image_without_vector_and_reason_is_an_error():
    embeddings = filled()
    with pytest.raises(BatchverifyError, match="1 images have neither a vector nor a reason"):
        embeddings.require_complete()
    embeddings.fail(4, Skipped(Reason.CRASHED))
    embeddings.require_complete()


def test_many_vectors_lie_in_a_mapped_file_that_leaves_nothing(tmp_path):
    plain, mapped = EmbeddingTable(5), EmbeddingTable(5, str(tmp_path), mapped_bytes=4 * 1024)
    assert isinstance(mapped.vectors.base, np.memmap) and plain.vectors.base is None
    for embeddings in (plain, mapped):
        embeddings.put(3, np.full(512, 0.5, np.float16))
    assert np.array_equal(plain.vectors, mapped.vectors)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BatchverifyError, match=r"no room for \d+\.\d GB of vectors"):
        EmbeddingTable(1 << 43, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_reasons_of_finished_rows_are_taken_over():
    embeddings = EmbeddingTable(4)
    embeddings.restore(np.array([0, 2, 3]), pa.array(["no_face", None, "crashed"]))
    assert embeddings.reasons(np.array([0, 3])).to_pylist() == ["no_face", "crashed"]
    assert [embeddings.known(index) for index in range(4)] == [True, False, False, True]
    embeddings.require_complete(np.array([0, 3]))
    with pytest.raises(BatchverifyError, match="1 images have neither"):
        embeddings.require_complete(np.array([0, 2]))


@pytest.mark.parametrize("seed", range(5))
def test_owners_are_those_of_a_dict(seed):
    generator, count = random.Random(seed), 300
    # Many want one slot, some differ only in the last stored byte, some hold zeros.
    keys = [
        bytes([generator.randrange(3)]) + bytes(14) + bytes([number % 256]) + generator.randbytes(16)
        if number % 2
        else generator.randbytes(32)
        for number in range(count)
    ]
    keys = list({key[:16]: key for key in keys}.values())
    owners, slow = ContentIndex(len(keys)), {}
    for _ in range(6000):
        index = generator.randrange(len(keys))
        key = keys[index]
        assert owners.get(key) == slow.get(key, -1)
        if generator.random() < 0.2:
            owners.drop(key)
            slow.pop(key, None)
        elif key not in slow:
            owners.put(key, index)
            slow[key] = index
    assert [owners.get(key) for key in keys] == [slow.get(key, -1) for key in keys]


def test_another_image_may_own_a_key_that_was_dropped():
    owners, keys = ContentIndex(3), [bytes([1]) * 32, bytes([1]) * 8 + bytes(24)]
    owners.put(keys[0], 2)
    owners.put(keys[1], 0)
    owners.drop(keys[0])
    assert [owners.get(key) for key in keys] == [-1, 0]
    owners.put(keys[0], 1)
    assert [owners.get(key) for key in keys] == [1, 0]


def test_a_run_without_images_has_no_owners():
    assert ContentIndex(0).get(bytes(32)) == -1
