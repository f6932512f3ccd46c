"""Many cells at once: the same references as one by one."""

import random

import numpy as np
import pyarrow as pa
import pytest

from batchverify.images import ImageRoot
from batchverify.locations import Location
from batchverify.references import References, UniqueImages
from batchverify.slots import Slots
from batchverify.spelling import from_bytes, resolve_many, to_bytes

QUERY = "?region=eu-west-1"
ROOTS = [
    ImageRoot(Location.parse(root), fenced)
    for root in ("/", "/data/m", "/data/é\udcff", "s3://bucket/pairs", f"s3://bucket{QUERY}", "gs://b/x")
    for fenced in (False, True)
]
PIECES = [
    "a",
    "b.jpg",
    "..",
    ".",
    "",
    " ",
    "/",
    "//",
    "data",
    "m",
    ":",
    "?",
    "x",
    "s3://bucket/",
    "gs://b/",
    "S3://",
]
PIECES += [
    "file:///data/",
    "data:,",
    "%41",
    "~",
    "é",
    "\0",
    "\n",
    "...",
    ".a",
    "..b",
    "pairs",
    "bucket",
    QUERY,
    "\u3000",
]
PIECES += ["s3://", "_x/", "http://h/", "\\"]


def cells(count: int) -> list[str | None]:
    generator = random.Random(0)
    made = ["".join(generator.choices(PIECES, k=generator.randrange(1, 7))) for _ in range(count)]
    slashed = ["/".join(generator.choices(PIECES, k=generator.randrange(1, 5))) for _ in range(count)]
    return [None, "", "a.jpg", "/data/m/a.jpg", "../b/a.jpg", "./a", *made, *slashed]


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: ascii(f"{root.root} {root.fenced}"))
def test_cells_by_the_batch_are_what_they_are_one_by_one(root):
    wanted = cells(3000)
    found = [from_bytes(text) for text in resolve_many(root, pa.array(wanted, pa.string())).to_pylist()]
    for cell, reference in zip(wanted, found, strict=True):
        assert reference == root.resolve(cell), repr(cell)


def test_references_are_what_went_in():
    for root in ROOTS:
        for cell in cells(50):
            reference = root.resolve(cell)
            assert from_bytes(to_bytes(reference)) == reference


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: ascii(f"{root.root} {root.fenced}"))
def test_images_are_numbered_by_what_their_cells_resolve_to(root):
    wanted, images, slow = cells(3000), UniqueImages(), []
    for cell in wanted:
        slow += [root.resolve(cell)] * (root.resolve(cell) not in slow)
    table = pa.array([*wanted, *wanted[:500]], pa.string())
    for start in range(0, len(table), 700):
        some = table.slice(start, 700)
        expected = [slow.index(root.resolve(cell)) for cell in some.to_pylist()]
        assert images.indices(root, some).tolist() == expected
        assert images.indices(root, some, add=False).tolist() == expected
    assert list(images.references) == slow


def test_images_that_are_not_known_are_none_without_add():
    images, root = UniqueImages(), ImageRoot(Location.parse("/data"))
    some = pa.array(["a.jpg", None, "../x.jpg", "b/c.jpg"])
    assert images.indices(root, some, add=False).tolist() == [-1] * 4
    images.indices(root, some.slice(2))
    assert images.indices(root, some, add=False).tolist() == [-1, -1, 0, 1]
    assert images.indices(root, some.slice(0, 0)).tolist() == []
    assert images.indices(root, pa.nulls(2, pa.string())).tolist() == [2, 2]


def test_bytes_under_a_null_cell_are_no_image():
    images, root = UniqueImages(), ImageRoot(Location.parse("/data"))
    full = pa.array(["a.jpg", "b.jpg", "c.jpg"])
    mask = pa.py_buffer(bytes([0b101]))
    cells = pa.StringArray.from_buffers(3, full.buffers()[1], full.buffers()[2], mask, null_count=1)
    assert cells.to_pylist() == ["a.jpg", None, "c.jpg"]
    assert images.indices(root, full).tolist() == [0, 1, 2]
    assert images.indices(root, cells).tolist() == [0, 3, 2]
    assert images.references[3] == root.resolve(None)


def test_one_file_under_two_roots_is_one_image():
    images = UniqueImages()
    outer, inner = (ImageRoot(Location.parse(each)) for each in ("/data", "/data/m"))
    assert images.indices(outer, pa.array(["m/a.jpg", "m/b.jpg", "a.jpg"])).tolist() == [0, 1, 2]
    assert images.indices(inner, pa.array(["b.jpg", "a.jpg", "m/a.jpg"])).tolist() == [1, 0, 3]


def test_texts_of_one_hash_are_told_apart():
    # Without a factor every hash is 0.
    references, names = References(secret=(0, 0)), [f"/x/{number}".encode() for number in range(3000)]
    for start in range(0, 3000, 500):
        some = pa.array(names[start : start + 600], pa.large_binary())
        assert references.numbers(some, add=True).tolist() == list(range(start, min(start + 600, 3000)))
    some = pa.array([names[7], b"/x/no", names[2999]], pa.large_binary())
    assert references.numbers(some, add=False).tolist() == [7, -1, 2999]
    assert [references[-1], len(references)] == ["/x/2999", 3000]


def test_hashes_look_at_every_byte_and_the_length():
    texts = [b"", b"\0", b"\0" * 8, b"\0" * 9]
    for size in range(1, 40):
        texts += [bytes([at == place for at in range(size)]) for place in range(size)]
    _, hashes = References().find(pa.array(texts, pa.large_binary()))
    assert len(set(hashes.tolist())) == len(texts)
    # The table looks at the last bits: ten may fall together by chance, of half of a million pairs one in 8,192.
    assert len(set((hashes & 8191).tolist())) > 0.9 * len(texts)


def test_names_that_differ_in_their_last_bytes_spread_over_the_table():
    names = [b"/data/" + bytes([first, last]) for first in range(128, 256) for last in range(128, 256)]
    _, hashes = References().find(pa.array(names, pa.large_binary()))
    # As many slots as names: by chance a share of 1 / e stays empty.
    assert len(set((hashes & (len(names) - 1)).tolist())) > 0.6 * len(names)


def test_numbers_are_found_whatever_the_order_and_the_size():
    generator = np.random.default_rng(0)
    hashes = generator.integers(-(2**63), 2**63, 60_000)
    hashes[1000:2000] = hashes[:1000]
    slots = Slots(lambda numbers: hashes[numbers])
    for start in range(0, len(hashes), 11_011):
        numbers = np.arange(start, min(start + 11_011, len(hashes)))
        slots.add(hashes[numbers], numbers)
    for number in generator.permutation(len(hashes)).tolist():
        assert slots.find_one(int(hashes[number]), lambda found: found == number) == number  # noqa: B023
    assert slots.find_one(int(hashes[5]), lambda number: number == 1005) == 1005
    assert slots.find_one(int(hashes[5]), lambda number: number == -5) == -1


def test_two_million_images_take_little_memory():
    images, root = UniqueImages(), ImageRoot(Location.parse("/data"))
    before = resident()
    count, size = 2_000_000, 100_000
    for start in range(0, count, size):
        images.indices(root, pa.array([f"{number:010d}.jpg" for number in range(start, start + size)]))
    text = len(images.references[0]) * count
    assert len(images) == count
    # A few megabytes are the batches themselves.
    assert (resident() - before - text) / count < 60


def resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
