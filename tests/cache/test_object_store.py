"""The cache in an object store: a real S3 API on localhost."""

import logging
from collections.abc import Iterator

import boto3
import pytest
from cache_samples import FINGERPRINT, entry, failure, key, new_cache, values
from object_store import impatience, object_store
from s3_server import s3_client, s3_options, s3_server

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.maintenance import cache_info, verify_cache
from batchverify.errors import ArtifactError
from batchverify.storage.location import Location

BUCKET = "faces"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """HOST:PORT of an S3 server in this process."""
    with s3_server() as started:
        yield started


@pytest.fixture
def store(address: str) -> Iterator[boto3.client]:
    """A client of the server with an empty bucket."""
    client = s3_client(address)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for name in names(client):
        client.delete_object(Bucket=BUCKET, Key=name)
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def root(address: str, store: boto3.client) -> str:  # noqa: ARG001 - the bucket exists while the URI is used
    """The URI of a cache in the bucket."""
    return f"s3://{BUCKET}/team/cache{s3_options(address)}"


def names(store: boto3.client, bucket: str = BUCKET) -> list[str]:
    return [each["Key"] for each in store.list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_round_trip_and_commit(root: str, store: boto3.client) -> None:
    cache = new_cache(root)
    written = [entry(number) for number in range(300)]
    cache.append([*written, failure(-1)])
    cache.commit()
    cache.append([entry(300)])
    cache.commit()
    reader = EmbeddingCache(root, FINGERPRINT)
    got = reader.get_many([key(300), key(7), key(-2), key(299)])
    assert values(got) == values([entry(300), written[7], None, written[299]])
    [failed] = reader.get_many([key(-1)])
    assert failed is not None and failed.skipped == failure(-1).skipped
    folder = f"team/cache/v1/{FINGERPRINT.id}"
    assert [name.rsplit("/", 1)[0] for name in names(store)] == [f"{folder}/data"] * 2 + [
        f"{folder}/fail",
        folder,
    ]


def test_an_index_serves_another_reader_and_new_writers_find_the_fingerprint(root: str) -> None:
    for number in (1, 2):
        cache = new_cache(root)
        cache.append([entry(number)])
        cache.commit()
    reader = EmbeddingCache(root, FINGERPRINT, index=EmbeddingCache(root, FINGERPRINT).index)
    assert values(reader.get_many([key(1), key(2)])) == values([entry(1), entry(2)])


def test_an_absent_cache_is_empty_and_not_made(root: str, store: boto3.client) -> None:
    assert EmbeddingCache(root, FINGERPRINT).get_many([key(1)]) == [None]
    assert cache_info(root) == [] and verify_cache(root).ok and names(store) == []


def test_a_damaged_segment_is_skipped_and_a_deleted_one_is_missing(
    root: str, store: boto3.client, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2, 3):
        cache = new_cache(root)
        cache.append([entry(number)])
        cache.commit()
    first, second = names(store)[:2]
    store.put_object(Bucket=BUCKET, Key=first, Body=b"PAR1" * 30)
    reader = EmbeddingCache(root, FINGERPRINT)
    with caplog.at_level(logging.WARNING):
        reader.refresh()
        store.delete_object(Bucket=BUCKET, Key=second)
        got = reader.get_many([key(1), key(2), key(3)])
    assert values(got) == values([None, None, entry(3)])
    assert len([record for record in caplog.records if "segment skipped" in record.getMessage()]) == 1
    report = verify_cache(root)
    assert [Location.parse(problem.path).path for problem in report.problems] == [f"{BUCKET}/{first}"]


def test_info_counts_what_lies_in_the_bucket(root: str, store: boto3.client) -> None:
    cache = new_cache(root)
    cache.append([entry(1), failure(2)])
    cache.commit()
    store.put_object(Bucket=BUCKET, Key="team/cache/notes.txt", Body=b"x")
    [info] = cache_info(root)
    assert (info.vectors, info.keys, info.failures, info.segments) == (1, 1, {"no_face": 1}, 2)
    assert [Location.parse(path).name for path in verify_cache(root).foreign] == ["notes.txt"]


def test_a_bucket_that_does_not_exist_is_reported(root: str) -> None:
    with pytest.raises(ArtifactError, match="--no-cache"):
        new_cache(root.replace(BUCKET, "nobody"))


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_segments_are_read_again_where_a_request_fails(fault: str) -> None:
    bucket = f"weather-{fault}"
    with object_store() as store, impatience(attempts=1):
        store.client().create_bucket(Bucket=bucket)
        root = f"s3://{bucket}/cache{store.options()}"
        cache = new_cache(root)
        for number in range(3):
            cache.append([entry(number)])
            cache.commit()
        weather = store.weather(first=fault)
        # The first question after each file fails here, the first request of its bytes below.
        for name in names(store.client(), bucket):
            Location.parse(f"s3://{bucket}/{name}{store.options()}").kind()
        asked = weather.done[fault]
        assert verify_cache(root).problems == ()
        assert weather.done[fault] >= asked + 3
