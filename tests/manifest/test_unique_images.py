"""Numbers of texts equal those of a Python dict, whatever the hashes are."""

import random
import zlib

import numpy as np
import pyarrow as pa
import pytest

from batchverify.manifest.paths import ImageRoot
from batchverify.manifest.unique_images import TextNumbers, UniqueImages
from batchverify.storage.location import Location


def large(texts: list[bytes]) -> pa.Array:
    return pa.array(texts, pa.large_binary())


def by_length(texts: pa.Array) -> np.ndarray:
    """Hashes, many of which are equal."""
    return np.array([len(text) for text in texts.to_pylist()], np.int64)


def all_one(texts: pa.Array) -> np.ndarray:
    return np.full(len(texts), -1, np.int64)


def few_slots(texts: pa.Array) -> np.ndarray:
    """Different hashes, many of which have the same slot."""
    return np.array([zlib.crc32(text) << 16 for text in texts.to_pylist()], np.int64)


HASHES = [None, by_length, all_one, few_slots]


def drawn(generator: random.Random, count: int) -> list[bytes]:
    """Short and long texts, with zeros and invalid UTF-8; many repeat."""
    texts = [
        b"",
        b"\0",
        b"\0" * 8,
        "people/\u5f20\u4f1f/é.jpg".encode(),
        b"/x/\xed\xb3\xbf",
        b"x" * 4096,
        b"x" * 4097,
        b"y" * 4097,
        b"z" * 100_000,
    ]
    for _ in range(count):
        some = generator.randbytes(generator.randrange(20))
        texts.append(generator.choice([some, b"%d.jpg" % generator.randrange(500), some[:1] * 9]))
    return texts


@pytest.mark.parametrize("hash_of", HASHES)
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_a_dict(hash_of, seed):
    generator, numbers, slow = random.Random(seed), TextNumbers(hash_of, put_at_once=100), {}
    texts = drawn(generator, 3000)
    for _ in range(40):
        some = generator.choices(texts, k=generator.choice([0, 1, 10, 200]))
        kept = generator.randrange(len(some) + 1)
        known = [slow.get(text, -1) for text in some[kept:]]
        assert numbers.numbers(large(some).slice(kept), add=False).tolist() == known
        expected = [slow.setdefault(text, len(slow)) for text in some[kept:]]
        found = numbers.numbers(large(some).slice(kept), add=True)
        assert found.tolist() == expected and found.dtype == np.int64
        assert len(numbers) == len(slow)
    assert [numbers[number] for number in range(len(slow))] == list(slow)
    assert numbers.numbers(large(list(slow)), add=False).tolist() == list(range(len(slow)))


@pytest.mark.parametrize("hash_of", HASHES)
def test_images_are_those_of_a_dict_whatever_the_hashes(hash_of):
    generator, images, slow = random.Random(0), UniqueImages(TextNumbers(hash_of)), {}
    roots = [ImageRoot(Location.parse(root), fenced=root == "/y") for root in ("/x", "/y", "s3://b/k")]
    names = [None, "", "a//b", "../x/5", "\u3000", "é/\u5f20", "/x/7", "/y/5", "s3://b/k/7", "a" * 5000]
    names += [f"{lead}{number}" for lead in ("", "./", "../y/", "/x/") for number in range(100)]
    for _ in range(60):
        root, cells = generator.choice(roots), generator.choices(names, k=generator.choice([0, 1, 150]))
        known = [slow.get(root.resolve(cell), -1) for cell in cells]
        assert images.indices(root, pa.array(cells, pa.string()), add=False).tolist() == known
        expected = [slow.setdefault(root.resolve(cell), len(slow)) for cell in cells]
        assert images.indices(root, pa.array(cells, pa.string())).tolist() == expected
    assert list(images) == list(slow)


def test_large_batches_are_taken_in_parts():
    root, cells = (
        ImageRoot(Location.parse("/x")),
        pa.array([*map(str, range(50)), *map(str, range(50)), None]),
    )
    whole, parts = UniqueImages(), UniqueImages(at_once=7)
    assert parts.indices(root, cells).tolist() == [*range(50), *range(50), 50]
    whole.indices(root, cells)
    assert parts == whole and parts != UniqueImages() and list(parts[48:]) == list(whole)[48:]
