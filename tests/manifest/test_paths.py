"""Which cells are read and from where, and what readers find in a file system."""

import os
import random
import socket
import subprocess
import sys
import threading

import pyarrow as pa
import pytest

from batchverify.faces.images import read_image
from batchverify.manifest.paths import ImageRoot, from_bytes, resolve_many, to_bytes
from batchverify.manifest.unique_images import UniqueImages
from batchverify.records import Limits, Reason, Skipped
from batchverify.storage.location import Location

OPEN = ImageRoot(Location("/data/set"))
FENCED = ImageRoot(Location("/data/set"), fenced=True)
REMOTE = ImageRoot(Location.parse("s3://bucket/set?endpoint_override=127.0.0.1:9&scheme=http"))
REMOTE_FENCED = ImageRoot(REMOTE.root, fenced=True)
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


def refused(root: ImageRoot, cell: str | None) -> Skipped:
    result = root.resolve(cell)
    assert isinstance(result, Skipped), result
    return result


@pytest.mark.parametrize(
    ("cell", "path"),
    [
        ("a.jpg", "/data/set/a.jpg"),
        ("./x//b/../a.jpg", "/data/set/x/a.jpg"),
        ("../other/a.jpg", "/data/other/a.jpg"),
        ("../../../../a.jpg", "/a.jpg"),
        ("/abs/a.jpg", "/abs/a.jpg"),
        ("file:///abs/a%20b.jpg", "/abs/a b.jpg"),
        ("FILE://localhost/abs/a.jpg", "/abs/a.jpg"),
        ("~/a.jpg", "/data/set/~/a.jpg"),
        (" a .jpg", "/data/set/ a .jpg"),
        ("a?b#c%20.jpg", "/data/set/a?b#c%20.jpg"),
        (r"C:\faces\a.jpg", r"/data/set/C:\faces\a.jpg"),
        ("12:30.jpg", "/data/set/12:30.jpg"),
        ("data:1/a.jpg", "/data/set/data:1/a.jpg"),
        ("s3://other/k/a b?c.jpg", "s3://other/k/a b?c.jpg"),
    ],
)
def test_cells_of_a_local_manifest(cell, path):
    assert OPEN.resolve(cell) == path


@pytest.mark.parametrize("cell", [None, "", "   ", "\t\n"])
def test_empty_cells_are_not_found(cell):
    assert refused(OPEN, cell) == Skipped(Reason.NOT_FOUND, "the cell is empty")


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        ("http://example.org/a.jpg", "'http'"),
        ("HTTPS://example.org/a.jpg", "'https'"),
        ("ftp://example.org/a.jpg", "'ftp'"),
        ("s3a://bucket/a.jpg", "'s3a'"),
        ("data:image/jpeg;base64,/9j/4AAQSkZJ", "'data'"),
        ("DATA:,hello", "'data'"),
        ("a\0.jpg", "NUL"),
        ("file:///a%00.jpg", "NUL"),
        ("file://host/share/a.jpg", "starts with file:///"),
        ("file://a.jpg", "starts with file:///"),
        ("s3://", "bucket"),
        ("s3:///a.jpg", "bucket"),
        ("gs://../a.jpg", "bucket"),
    ],
)
def test_cells_that_no_root_allows(cell, word):
    skipped = refused(OPEN, cell)
    assert skipped.reason is Reason.FORBIDDEN
    assert word in skipped.message


def test_secrets_in_a_uri_are_not_repeated():
    skipped = refused(OPEN, "s3://AKIAKEY:se/cret@bucket/a.jpg")
    assert skipped.reason is Reason.FORBIDDEN
    assert "cret" not in skipped.message
    assert "AKIA" not in skipped.message


def test_long_cells_make_short_messages():
    for cell in (
        "data:image/png;base64," + "A" * 10**6,
        "ftp://" + "a" * 10**6,
        "/" + "a" * 10**6,
        "file://" + "a" * 10**6,
    ):
        assert len(refused(FENCED, cell).message) < 250


@pytest.mark.parametrize("cell", ["a.jpg", "x/../a.jpg", "/data/set/a.jpg", "../set/a.jpg", "file:///data/set/a.jpg"])
def test_paths_inside_a_fence(cell):
    assert FENCED.resolve(cell) == "/data/set/a.jpg"


@pytest.mark.parametrize(
    "cell",
    [
        "../a.jpg",
        "x/../../a.jpg",
        "/data/settings/a.jpg",
        "/data/a.jpg",
        "//data/set/a.jpg",
        "file:///data/a.jpg",
        "file:///data/set/%2e%2e/a.jpg",
        "s3://data/set/a.jpg",
        ".",
    ],
)
def test_paths_outside_a_fence(cell):
    skipped = refused(FENCED, cell)
    assert skipped.reason is Reason.FORBIDDEN
    assert "/data/set" in skipped.message
    assert cell in skipped.message


def test_the_whole_machine_as_a_fence():
    root = ImageRoot(Location("/"), fenced=True)
    assert root.resolve("../a.jpg") == "/a.jpg"
    assert refused(root, "s3://bucket/a.jpg").reason is Reason.FORBIDDEN


OPTIONS = "?endpoint_override=127.0.0.1:9&scheme=http"


@pytest.mark.parametrize("root", [REMOTE, REMOTE_FENCED], ids=["open", "fenced"])
@pytest.mark.parametrize("cell", ["a.jpg", "x/../a.jpg", "s3://bucket/set/a.jpg", "s3://bucket/set/a.jpg" + OPTIONS])
def test_cells_of_a_manifest_in_an_object_store(root, cell):
    assert root.resolve(cell) == "s3://bucket/set/a.jpg" + OPTIONS


def test_keys_with_special_characters_reach_the_reader():
    cell = "photo.php?id=7&size=2#x %20.jpg"
    resolved = REMOTE.resolve(cell)
    assert isinstance(resolved, str)
    assert Location.parse(resolved) == Location(f"bucket/set/{cell}", "s3", OPTIONS)


@pytest.mark.parametrize("root", [REMOTE, REMOTE_FENCED], ids=["open", "fenced"])
@pytest.mark.parametrize("cell", ["/etc/passwd", "file:///etc/passwd", "FILE://localhost/etc/passwd"])
def test_a_manifest_in_an_object_store_reads_no_local_file(root, cell):
    skipped = refused(root, cell)
    assert skipped.reason is Reason.FORBIDDEN
    assert "local file" in skipped.message


def test_a_manifest_in_an_object_store_never_leaves_its_bucket_by_dots():
    assert REMOTE.resolve("../../../../etc/passwd") == "s3://bucket/etc/passwd" + OPTIONS
    assert refused(REMOTE_FENCED, "../../../../etc/passwd").reason is Reason.FORBIDDEN


NAMES_A_SERVER = [
    "s3://b/k?endpoint_override=10.0.0.1:80",
    "s3://b/k?region=eu-west-1",
    "S3://b/k?x?scheme=http&endpoint_override=evil.example",
    "gs://b/k?endpoint_override=evil.example&scheme=http",
    "abfs://c@evil.example/k",
    "abfss://c@account.dfs.core.windows.net/k",
    "az://c@account/k?enable_tls=false",
    "abfs://c/k?account=evil.example",
]


@pytest.mark.parametrize("cell", NAMES_A_SERVER)
@pytest.mark.parametrize("root", [OPEN, FENCED, REMOTE], ids=["open", "fenced", "remote"])
def test_a_cell_names_no_server_and_no_account(monkeypatch, root, cell):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    skipped = refused(root, cell)
    assert skipped.reason is Reason.FORBIDDEN
    assert "a cell may name no server, account or other option" in skipped.message
    assert "evil" not in skipped.message and "10.0.0.1" not in skipped.message
    assert from_bytes(resolve_many(root, pa.array([cell, cell]))[0].as_py()) == skipped


@pytest.mark.parametrize("root", ["s3://bucket/set", "abfs://box/set", "abfs://box@mine.dfs.core.windows.net/set"])
@pytest.mark.parametrize("fenced", [False, True])
def test_options_at_the_end_of_a_relative_path_are_no_way_out_either(root, fenced):
    root = ImageRoot(Location.parse(root), fenced)
    for cell in (
        "k?endpoint_override=evil.example&scheme=http",
        "x/../k?account=evil.example",
        "../../k?region=x",
    ):
        assert refused(root, cell).reason is Reason.FORBIDDEN


def test_the_account_of_the_environment_may_be_repeated(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "mine")
    for cell in ("abfs://box/a.jpg", "abfs://box@mine/a.jpg", "abfss://box@mine.dfs.core.windows.net/a.jpg"):
        assert Location.parse(str(OPEN.resolve(cell))).path == "box/a.jpg"
    assert refused(OPEN, "abfs://box@mine.evil.example/a.jpg").reason is Reason.FORBIDDEN
    assert refused(OPEN, "abfs://box@mine/a.jpg?enable_tls=false").reason is Reason.FORBIDDEN
    assert refused(OPEN, "s3://box/a.jpg?account=mine").reason is Reason.FORBIDDEN


@pytest.mark.parametrize(
    "cell",
    [
        "https://me:hunter2@host/a.jpg",
        "https://host/a.jpg?X-Amz-Signature=hunter2&x=1",
        "s3://b/a.jpg?X-Amz-Credential=hunter2",
        "s3://b/a.jpg?sig=hunter2",
        "abfs://c/a.jpg?sv=2024&SIG=hunter2",
        "file://me:hunter2@host/a.jpg",
    ],
)
def test_a_refused_cell_is_shown_without_its_secret(cell):
    for root in (OPEN, REMOTE):
        skipped = refused(root, cell)
        assert skipped.reason is Reason.FORBIDDEN
        assert "hunter2" not in skipped.message


def test_a_fence_keeps_out_other_buckets_and_other_servers():
    assert REMOTE.resolve("s3://other/a.jpg") == "s3://other/a.jpg" + OPTIONS
    assert REMOTE.resolve("gs://other/a.jpg") == "gs://other/a.jpg"
    for cell in (
        "s3://other/set/a.jpg",
        "gs://bucket/set/a.jpg",
        "s3://bucket/set/a.jpg?endpoint_override=10.0.0.1:80",
    ):
        assert refused(REMOTE_FENCED, cell).reason is Reason.FORBIDDEN


def reason(path, limits: Limits | None = None) -> Reason:
    result = read_image(str(path), limits or Limits())
    assert isinstance(result, Skipped), result
    assert str(path) in result.message
    return result.reason


def test_bytes_come_back_as_they_are(tmp_path):
    (tmp_path / "ä b#?.jpg").write_bytes(b"\0\xff" * 1000)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "ä b#?.jpg")
    assert read_image(str(tmp_path / "ä b#?.jpg"), Limits()) == b"\0\xff" * 1000
    assert read_image(str(tmp_path / "link.jpg"), Limits()) == b"\0\xff" * 1000
    assert read_image(str(tmp_path / "empty.jpg"), Limits()) == b""


def test_the_limit_itself_is_allowed(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 2000)
    assert read_image(str(path), Limits(bytes=2000)) == b"x" * 2000
    assert reason(path, Limits(bytes=1999)) is Reason.TOO_LARGE


def test_missing_files_are_not_found(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    for path in ("b.jpg", "no/folder/b.jpg", "a.jpg/b.jpg", "dangling.jpg"):
        assert reason(tmp_path / path) is Reason.NOT_FOUND


def test_other_than_regular_files_are_unreadable(tmp_path):
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    for path in (tmp_path, "/dev/zero", tmp_path / "s", tmp_path / "loop.jpg", tmp_path / ("n" * 300)):
        assert reason(path) is Reason.UNREADABLE
    listener.close()


def test_a_named_pipe_does_not_hang_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    found: list[Reason] = []
    reader = threading.Thread(target=lambda: found.append(reason(tmp_path / "pipe.jpg")), daemon=True)
    reader.start()
    reader.join(10)
    assert found == [Reason.UNREADABLE]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_unreadable(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg").chmod(0)
    assert reason(tmp_path / "a.jpg") is Reason.UNREADABLE


def test_names_that_no_file_can_have():
    assert read_image("/a\0b", Limits()).reason is Reason.UNREADABLE
    assert read_image("/\ud800.jpg", Limits()).reason is Reason.UNREADABLE


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="no /proc/kmsg here")  # noqa: PTH110
def test_pseudo_files_that_wait_for_more_do_not_hang_the_reader():
    # A regular file of size 0, whose reader waits for the kernel's next message.
    result = read_image("/proc/kmsg", Limits())
    assert result == b"" or result.reason is Reason.UNREADABLE


def cells(count: int) -> list[str | None]:
    generator = random.Random(0)
    made = ["".join(generator.choices(PIECES, k=generator.randrange(1, 7))) for _ in range(count)]
    slashed = ["/".join(generator.choices(PIECES, k=generator.randrange(1, 5))) for _ in range(count)]
    return [None, "", "a.jpg", "/data/m/a.jpg", "../b/a.jpg", "./a", *made, *slashed]


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: ascii(f"{root.root} {root.fenced}"))
def test_batches_of_cells_resolve_as_single_cells_do(root):
    wanted = cells(3000)
    resolved = [from_bytes(text) for text in resolve_many(root, pa.array(wanted, pa.string())).to_pylist()]
    for cell, image in zip(wanted, resolved, strict=True):
        assert image == root.resolve(cell), repr(cell)


def test_resolved_cells_survive_the_encoding():
    for root in ROOTS:
        for cell in cells(50):
            image = root.resolve(cell)
            assert from_bytes(to_bytes(image)) == image


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: ascii(f"{root.root} {root.fenced}"))
def test_images_are_numbered_by_their_resolved_cells(root):
    wanted, images, numbers = cells(3000), UniqueImages(), {}
    number_of = {cell: numbers.setdefault(root.resolve(cell), len(numbers)) for cell in wanted}
    table = pa.array([*wanted, *wanted[:500]], pa.string())
    for start in range(0, len(table), 700):
        some = table.slice(start, 700)
        expected = [number_of[cell] for cell in some.to_pylist()]
        assert images.indices(root, some).tolist() == expected
        assert images.indices(root, some, add=False).tolist() == expected
    assert list(images) == list(numbers)


def test_unknown_images_have_no_number_without_add():
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


# In its own process, where no freed memory of other tests counts.
TWO_MILLION = """
import pyarrow as pa
from batchverify.manifest.paths import ImageRoot
from batchverify.storage.location import Location
from batchverify.manifest.unique_images import UniqueImages

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
    # About 30 bytes are kept; batches and growing tables leave the rest behind.
    assert float(done.stdout) < 90
