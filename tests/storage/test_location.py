"""Locations: parsing of paths and URIs, atomic writes, and a real S3 API on localhost."""

import errno
import os
import resource
import socket
import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pytest
from s3_server import s3_options, s3_server

from batchverify.errors import UsageError
from batchverify.faces.images import read_image
from batchverify.records import Limits, Reason
from batchverify.storage.location import Location, publish, scheme_of, sync_folder

OPTIONS = "?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("s3://bucket/key", "s3"),
        ("HTTP://host", "http"),
        ("s3a+x://b", "s3a+x"),
        ("/a/b", ""),
        ("a/b://c", ""),
        (r"C:\x", ""),
        ("C://x", ""),
        ("a:b", ""),
        ("s3:/bucket", ""),
        ("://x", ""),
        ("", ""),
    ],
)
def test_schemes(text, scheme):
    assert scheme_of(text) == scheme


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("/a//b/./../c", Location("/a/c")),
        ("/a b?c#d%20", Location("/a b?c#d%20")),
        ("file:///a%20b/c", Location("/a b/c")),
        ("file://localhost/a", Location("/a")),
        ("file:////a", Location("/a")),
        ("file:///a/../../b", Location("/b")),
        ("s3://bucket", Location("bucket", "s3")),
        ("S3://bucket/a//b/./../c/", Location("bucket/a/c", "s3")),
        ("s3://bucket/../../x", Location("bucket/x", "s3")),
        ("s3://bucket/a b#c%20d?e", Location("bucket/a b#c%20d?e", "s3")),
        ("s3://bucket/x.php?id=7", Location("bucket/x.php?id=7", "s3")),
        ("s3://bucket/k" + OPTIONS, Location("bucket/k", "s3", OPTIONS)),
        ("s3://bucket" + OPTIONS, Location("bucket", "s3", OPTIONS)),
        ("s3://bucket/x.php?id=7?region=eu", Location("bucket/x.php?id=7", "s3", "?region=eu")),
        ("s3://b/k?tls_ca_file_path=/etc/ca.pem", Location("b/k", "s3", "?tls_ca_file_path=/etc/ca.pem")),
        ("gs://bucket/k?retry_limit_seconds=5", Location("bucket/k", "gs", "?retry_limit_seconds=5")),
    ],
)
def test_a_location_parses_prints_and_parses_again(text, location):
    parsed = Location.parse(text)
    assert parsed == location
    assert Location.parse(str(parsed)) == parsed


def test_relative_paths_start_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Location.parse("a/../b") == Location(str(tmp_path / "b"))
    assert Location.parse(tmp_path / "b") == Location(str(tmp_path / "b"))
    assert Location.parse("~/b") == Location("/home/someone/b")
    assert Location.parse(".") == Location(str(tmp_path))
    assert Location.parse("~nobody-of-this-name/b") == Location(str(tmp_path / "~nobody-of-this-name" / "b"))


@pytest.mark.parametrize("home", [None, "relative"])
def test_without_a_home_folder_no_folder_here_takes_its_place(monkeypatch, home):
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_123)
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
    for text in ("~", "~/b"):
        with pytest.raises(UsageError, match=f"^{text}: user id 4000000123 has no home folder"):
            Location.parse(text)


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_broken_disk_is(monkeypatch, tmp_path):
    # Linux has folders of that kind: nothing in /proc is on a disk.
    folder = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(folder)
    os.close(folder)
    sync_folder(Path("/proc"))
    sync_folder(tmp_path)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "http://host/a",
            "http://host/a: scheme 'http' is not supported (local paths, file, s3, gs, gcs, abfs, abfss, az)",
        ),
        ("file://host/a", "file://host/a: a file URI starts with file:///"),
        ("file://", "file://: a file URI starts with file:///"),
        ("s3://", "s3://…: a bucket's name must follow; keys belong in the environment"),
        ("s3:///key", "s3://…: a bucket's name must follow; keys belong in the environment"),
        ("s3://../key", "s3://…: a bucket's name must follow; keys belong in the environment"),
        (
            "s3://AKIA:secret@bucket/key",
            "s3://…: a bucket's name must follow; keys belong in the environment",
        ),
    ],
)
def test_invalid_locations(text, message):
    with pytest.raises(UsageError) as caught:
        Location.parse(text)
    assert str(caught.value) == message


def test_joins_parents_names():
    key = Location("bucket/a", "s3", OPTIONS)
    assert key.join("b", "c.Parquet") == Location("bucket/a/b/c.Parquet", "s3", OPTIONS)
    assert key.join("b", "c.Parquet").suffix == ".parquet"
    assert key.join("b", "c.Parquet").name == "c.Parquet"
    assert key.join("../../../x").normal() == Location("bucket/x", "s3", OPTIONS)
    assert key.parent == Location("bucket", "s3", OPTIONS)
    assert key.parent.parent == key.parent
    assert Location("/a/").join("b") == Location("/a/b")
    assert Location("/").join("a") == Location("/a")
    assert Location("/a").parent.parent == Location("/")
    assert Location("/a/../b").normal() == Location("/b")
    assert Location("/a").is_local
    assert not key.is_local


def test_kinds_and_files_of_a_folder(tmp_path):
    for name in ("b.csv", "B.csv", "a b#?.csv", ".hidden", "sub/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "dangling").symlink_to("nowhere")
    folder = Location.parse(tmp_path)
    assert [(each.name, size) for each, size in folder.files()] == [
        (".hidden", 7),
        ("B.csv", 5),
        ("a b#?.csv", 9),
        ("b.csv", 5),
    ]
    assert [each.path for each, _ in folder.files(recursive=True)] == sorted(
        str(tmp_path / name) for name in ("b.csv", "B.csv", "a b#?.csv", ".hidden", "sub/c.csv")
    )
    assert [each.kind() for each in (folder, folder.join("b.csv"), folder.join("nothing"))] == [
        "folder",
        "file",
        "absent",
    ]
    assert folder.join("nothing").files() == []


def test_a_folder_that_appears_while_it_is_listed_is_no_error(tmp_path):
    folder, listed = tmp_path / "new", threading.Event()

    def flip():
        while not listed.is_set():
            folder.mkdir()
            folder.rmdir()

    other = threading.Thread(target=flip)
    other.start()
    try:
        assert all(Location.parse(folder).files() == [] for _ in range(20_000))
    finally:
        listed.set()
        other.join()


def test_names_that_are_not_utf8_are_reported(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.csv")).touch()
    with pytest.raises(UsageError, match=r"a name in this folder is not UTF-8: .*xff\.csv"):
        Location.parse(tmp_path).files()


def test_folders_are_private_to_the_user(tmp_path):
    folder = Location.parse(tmp_path / "a" / "b")
    folder.make_folder()
    folder.make_folder()
    assert os.stat(folder.path).st_mode & 0o777 == 0o700  # noqa: PTH116


@pytest.mark.parametrize("data", [b"new" * 1000, memoryview(b"new" * 1000), pa.py_buffer(b"new" * 1000)])
def test_a_written_file_is_complete_and_leaves_no_temporary_file(tmp_path, data):
    staging = tmp_path / "tmp"
    staging.mkdir()
    target = Location.parse(tmp_path / "a.bin")
    target.write_bytes(b"old")
    target.write_bytes(data, staging=Location.parse(staging))
    assert (tmp_path / "a.bin").read_bytes() == b"new" * 1000
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "tmp"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    target = Location.parse(tmp_path / "a.bin")
    target.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            target.write_bytes(b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_a_target_that_cannot_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        Location.parse(tmp_path / "folder").write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        Location.parse(tmp_path / "nowhere" / "a").write_bytes(b"x")
    with pytest.raises(NotADirectoryError):
        Location.parse(tmp_path / "a").write_bytes(b"x", staging=Location("/dev/null"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "sub"]


def test_publishing_replaces(tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    publish(tmp_path / "new", tmp_path / "old")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"new")]


@pytest.fixture(scope="module")
def server():
    """The address of a real S3 API on this machine."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(server):
    """A new, empty bucket, by the URI query that names the server."""
    options = f"{s3_options(server)}&allow_bucket_creation=true"
    location = Location.parse(f"s3://test-{uuid.uuid4().hex[:12]}{options}")
    location.filesystem.create_dir(location.path)
    return location


@pytest.mark.parametrize("key", ["a.jpg", "x y/ä#b?c=d%20+&e.jpg", "photo.php?id=7"])
def test_objects_are_written_listed_and_read(bucket, key):
    location = bucket.join(key)
    assert location.kind() == "absent"
    location.write_bytes(b"\0\xff" * 5000)
    assert location.kind() == "file"
    assert bucket.kind() == "folder"
    assert bucket.files(recursive=True) == [(location, 10_000)]
    assert read_image(str(location), Limits()) == b"\0\xff" * 5000
    assert read_image(str(location), Limits(bytes=9_999)).reason is Reason.TOO_LARGE


def test_files_of_a_prefix_are_sorted(bucket):
    for key in ("m/b.csv", "m/a.csv", "m/sub/c.csv", "mm.csv"):
        bucket.join(key).write_bytes(b"x")
    assert [each.path.split("/", 1)[1] for each, _ in bucket.join("m").files()] == ["m/a.csv", "m/b.csv"]
    assert bucket.join("nothing").files() == []


def test_absent_objects_and_buckets(bucket):
    bucket.join("folder/a.jpg").write_bytes(b"x")
    nowhere = Location("no-such-bucket/a.jpg", "s3", bucket.query)
    assert read_image(str(bucket.join("b.jpg")), Limits()).reason is Reason.NOT_FOUND
    assert read_image(str(bucket.join("folder")), Limits()).reason is Reason.NOT_FOUND
    assert read_image(str(nowhere), Limits()).reason is Reason.NOT_FOUND
    assert read_image(str(bucket), Limits()).reason is Reason.UNREADABLE
    with pytest.raises(OSError, match="bucket does not exist"):
        nowhere.write_bytes(b"x")


def test_plain_uris_follow_the_endpoint_of_the_environment(bucket, server, monkeypatch):
    bucket.join("a.jpg").write_bytes(b"from the server")
    plain = f"s3://{bucket.path}/a.jpg"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        elsewhere = Location.parse(plain).filesystem
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
        assert Location.parse(plain).filesystem is not elsewhere
        assert Location.parse(plain).filesystem is Location.parse(plain).filesystem
        assert read_image(plain, Limits()) == b"from the server"


def test_an_error_about_options_names_the_uri(bucket):
    wrong = Location.parse(f"s3://{bucket.path}/a.jpg?region=us-east-1&regoin=x")
    with pytest.raises(UsageError, match=r"regoin=x: cannot be opened: .*regoin"):
        wrong.kind()
    skipped = read_image(str(wrong), Limits())
    assert skipped.reason is Reason.UNREADABLE
    assert "regoin" in skipped.message
