"""JSON of others: what is refused, in bounded time and memory."""

import json

import pytest

from batchverify.documents import MOST_DEPTH, MOST_METADATA, read_document


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, {"b": "c"}]}, [], {}, "text", 3, None])
def test_what_we_write_comes_back(value):
    assert read_document(json.dumps(value)) == value
    assert read_document(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("", "Expecting"),
        (b"\xff\xfe\xff", "decode"),
        (nested(MOST_DEPTH + 1), "objects inside one another"),
        (nested(100_000), "objects inside one another"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "objects inside one another"),
        ('{"a": 1, "b": 2, "a": 1}', "one name twice"),
        ('[{"x": {"a": 1, "a": 2}}]', "one name twice"),
        ('"' + "a" * MOST_METADATA + '"', "bytes of JSON, the limit is 4,194,304"),
        ("9" * 10_000, "digits"),
    ],
    ids=["cut", "empty", "bytes", "deep", "deeper", "objects", "twice", "twice inside", "huge", "digits"],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_document(text)


def test_the_depth_itself_is_allowed():
    assert read_document(nested(MOST_DEPTH)) == json.loads(nested(MOST_DEPTH))
