"""Object stores: slow, failing and refusing ones; schemes, options and secrets."""

from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from object_store import Store, object_store
from pyarrow import fs
from repository import REPOSITORY
from s3_server import KEYS

from batchverify.cache.image_keys import content_key
from batchverify.cli.app import main
from batchverify.engine.stages import READERS, Loader, LoadPlan
from batchverify.errors import UsageError
from batchverify.faces.images import read_image
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.manifest.paths import ImageRoot
from batchverify.records import Limits, Reason, Skipped
from batchverify.storage.location import Location

FACES = REPOSITORY / "sample_manifests"
AZURE = "abfs://faces@team.dfs.core.windows.net"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as store:
        store.client().create_bucket(Bucket="weather")
        yield store


@pytest.fixture
def bucket(store: Store) -> Location:
    """A bucket behind a proxy in fine weather."""
    store.weather()
    return Location.parse(f"s3://weather{store.options()}")


@pytest.mark.parametrize("kind", ["500", "503", "reset", "cut"])
def test_transient_errors_are_retried(store: Store, bucket: Location, kind: str) -> None:
    location = bucket.join(f"again-{kind}.jpg")
    weather = store.weather(first=kind if kind != "cut" else "")
    location.write_bytes(b"x" * 50_000)
    weather = store.weather(first=kind)
    assert read_image(str(location), Limits()) == b"x" * 50_000
    assert location.kind() == "file"
    assert weather.done[kind] >= 1


def test_requests_are_repeated_however_often_that_was_needed_before(store: Store, bucket: Location) -> None:
    """The SDK's standard strategy stops for good after a hundred repeats."""
    names = [f"often-{number}" for number in range(70)]
    for name in names:
        store.client().put_object(Bucket="weather", Key=name, Body=b"x" * 4000)
    weather = store.weather(first="500")
    filesystem = bucket.filesystem
    for name in names:
        with filesystem.open_input_file(f"{bucket.path}/{name}") as file:
            assert file.read() == b"x" * 4000
    assert weather.done["500"] >= 140


@pytest.mark.skipif("allow_delayed_open" not in str(fs.S3FileSystem.__doc__), reason="pyarrow 18")
def test_a_small_object_is_one_request(store: Store, bucket: Location) -> None:
    weather = store.weather()
    bucket.join("small").write_bytes(b"x" * 4_000_000)
    assert weather.done == {"PUT": 1}
    assert bucket.join("small").read_bytes() == b"x" * 4_000_000


def test_permanent_errors_become_a_reason(store: Store, bucket: Location) -> None:
    bucket.join("denied.jpg").write_bytes(b"x")
    weather = store.weather(poisoned={"denied": "403"})
    denied = read_image(str(bucket.join("denied.jpg")), Limits())
    assert isinstance(denied, Skipped) and denied.reason is Reason.FORBIDDEN
    assert str(bucket.join("denied.jpg")) in denied.message
    assert weather.done["403"] == 1, "a refused request is not retried"
    absent = read_image(str(bucket.join("absent.jpg")), Limits())
    assert isinstance(absent, Skipped) and absent.reason is Reason.NOT_FOUND


def test_images_are_read_in_parallel_over_few_connections(store: Store, bucket: Location) -> None:
    contents = [path.read_bytes() for path in sorted((FACES / "faces").iterdir())] * 4
    for number, data in enumerate(contents):
        store.client().put_object(Bucket="weather", Key=f"many/{number}.jpg", Body=data)
    image_paths = [str(bucket.join(f"many/{number}.jpg")) for number in range(len(contents))]
    image_paths[5] = str(bucket.join("many/nothing.jpg"))
    weather = store.weather(crowd=READERS)
    settings = EmbeddingSettings(crop="none")
    loaded, images = Loader(LoadPlan(settings, EmbeddingFingerprint({})), None)(image_paths)
    assert len(loaded.keys) == len(image_paths)
    assert [key is None for key in loaded.keys] == [number == 5 for number in range(len(image_paths))]
    assert loaded.skipped[5].reason is Reason.NOT_FOUND
    assert loaded.keys[:5] == [content_key(data) for data in contents[:5]]
    assert len(images) == len(loaded.missing) == len(set(contents))
    assert weather.at_once == READERS
    assert weather.connections <= READERS + 1


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("manifest", "cannot be read"),
        ("head", "cannot be read"),
        ("output", "cannot be written"),
        ("cache", "cannot be used"),
    ],
)
def test_missing_permissions_are_reported_with_the_uri_and_without_keys(
    store: Store, bucket: Location, which: str, words: str
) -> None:
    bucket.join("manifest.csv").write_bytes(b"image_a,image_b\na.jpg,b.jpg\n")
    bucket.join("head.safetensors").write_bytes(b"x")
    store.weather(poisoned={which: "403"})
    command = ["score", str(bucket.join("manifest.csv")), "-o", str(bucket.join("output.parquet"))]
    command += ["--cache", str(bucket.join("cache")), "--crop", "none", "-q"]
    if which == "head":
        command += ["--head", str(bucket.join("head.safetensors"))]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2, done.output
    assert f"s3://weather/{which}" in done.output and words in done.output
    assert not any(secret in done.output for secret in KEYS.values())


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        (f"{AZURE}/a/b.jpg", f"{AZURE}/a/b.jpg"),
        ("abfss://faces@team.dfs.core.windows.net/a//b", f"{AZURE}/a/b"),
        ("az://faces/a.jpg", "abfs://faces/a.jpg"),
        (f"{AZURE}/a?enable_tls=false", f"{AZURE}/a?enable_tls=false"),
        (AZURE, AZURE),
        ("gs://faces/a.jpg?project_id=x", "gs://faces/a.jpg?project_id=x"),
    ],
)
def test_uris_of_azure_and_google_round_trip(text: str, printed: str) -> None:
    location = Location.parse(text)
    assert str(location) == printed
    assert Location.parse(str(location)) == location
    assert location.path.split("/")[0] == "faces"


def test_cells_of_azure_are_held_to_their_root() -> None:
    root = ImageRoot(Location.parse(f"{AZURE}/in"), fenced=True)
    assert root.resolve("a.jpg") == f"{AZURE}/in/a.jpg"
    assert root.resolve(f"{AZURE}/in/a.jpg") == f"{AZURE}/in/a.jpg"
    assert root.resolve("abfs://faces/in/a.jpg") == f"{AZURE}/in/a.jpg"
    for outside in (f"{AZURE}/a.jpg", "abfs://faces@other.dfs.core.windows.net/in/a.jpg", "/etc/passwd"):
        skipped = root.resolve(outside)
        assert isinstance(skipped, Skipped) and skipped.reason is Reason.FORBIDDEN


def test_file_systems_of_azure_and_google(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    assert isinstance(Location.parse("gs://faces/a").filesystem, fs.GcsFileSystem)
    if not hasattr(fs, "AzureFileSystem"):
        with pytest.raises(UsageError, match="built without abfs://"):
            _ = Location.parse(f"{AZURE}/a").filesystem
        return
    first = Location.parse(f"{AZURE}/a").filesystem
    assert isinstance(first, fs.AzureFileSystem)
    assert Location.parse(f"{AZURE}/b").filesystem is first
    other = Location.parse("abfs://faces@other.dfs.core.chinacloudapi.cn/a").filesystem
    assert not first.equals(other)
    with pytest.raises(UsageError, match=r"abfs://faces: cannot be opened: no account: write abfs://CONTAINER@"):
        _ = Location.parse("abfs://faces/a").filesystem
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "team")
    assert Location.parse("abfs://faces/a").filesystem.equals(first)


@pytest.mark.parametrize(
    "text",
    [
        f"{AZURE}/a?sig=s3cr3t",
        f"{AZURE}/a?client_secret=s3cr3t",
        "s3://faces/a?region=x&secret_key=s3cr3t",
        "abfs://team:s3cr3t@faces/a",
    ],
)
def test_secrets_in_uris_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="keys belong in the environment") as caught:
        Location.parse(text)
    assert "s3cr3t" not in str(caught.value)
