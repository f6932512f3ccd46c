"""JSON texts that others may have written, read within limits."""

from __future__ import annotations

import json
from typing import Any

# Bytes of a run record or a job's state, which list the manifest's files, and of the metadata of an artifact.
MOST_RECORD = 64 << 20
MOST_METADATA = 4 << 20
# Objects and arrays inside one another. Ours have up to six.
MOST_DEPTH = 32


def read_document(text: str | bytes, most: int = MOST_METADATA) -> Any:
    """The value of a JSON text.

    Raises `ValueError` for a text that is not JSON, has more than `most` bytes or characters, holds more than
    `MOST_DEPTH` objects and arrays inside one another, or gives one name twice in an object: readers disagree about
    which of the two counts.
    """
    if len(text) > most:
        raise ValueError(f"{len(text):,} bytes of JSON, the limit is {most:,}")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as exc:
        raise ValueError(f"JSON with more than {MOST_DEPTH} objects inside one another") from exc
    _check_depth(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("JSON that gives one name twice in an object")
    return document


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [part for each in nested for part in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise ValueError(f"JSON with more than {MOST_DEPTH} objects inside one another")
