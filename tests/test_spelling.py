"""Many cells at once: the same references as one by one."""

import random
import subprocess
import sys

import pyarrow as pa
import pytest

from batchverify.images import ImageRoot
from batchverify.spelling import from_bytes, resolve_many, to_bytes
from batchverify.storage.location import Location
from batchverify.unique_images import UniqueImages

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
    assert list(images) == slow


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
    assert images[3] == root.resolve(None)


def test_one_file_under_two_roots_is_one_image():
    images = UniqueImages()
    outer, inner = (ImageRoot(Location.parse(each)) for each in ("/data", "/data/m"))
    assert images.indices(outer, pa.array(["m/a.jpg", "m/b.jpg", "a.jpg"])).tolist() == [0, 1, 2]
    assert images.indices(inner, pa.array(["b.jpg", "a.jpg", "m/a.jpg"])).tolist() == [1, 0, 3]


# In a process of its own: others' freed memory would count.
TWO_MILLION = """
import pyarrow as pa
from batchverify.images import ImageRoot
from batchverify.storage.location import Location
from batchverify.unique_images import UniqueImages

def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096

images, root = UniqueImages(), ImageRoot(Location.parse("/data"))
before, count, size = resident(), 2_000_000, 100_000
for start in range(0, count, size):
    images.indices(root, pa.array([f"{number:010d}.jpg" for number in range(start, start + size)]))
assert len(images) == count
print((resident() - before - len(str(images[0])) * count) / count)
"""


def test_two_million_images_take_little_memory():
    done = subprocess.run([sys.executable, "-c", TWO_MILLION], capture_output=True, text=True, check=True)
    # Some 30 are kept; the rest is what the batches and growing tables leave behind.
    assert float(done.stdout) < 90
