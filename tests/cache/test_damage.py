"""A cache with damaged, replaced or absent files: the rest is served, and damage is logged once."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_samples import FINGERPRINT, OTHER, entry, failure, flip, key, segments, values, write

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import (
    MOST_GROUP,
    MOST_MESSAGE,
    Entry,
    read_segment,
    vector_schema,
    vector_table,
    write_segment,
)
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location


def open_cache(root: Path) -> EmbeddingCache:
    return EmbeddingCache(str(root), FINGERPRINT)


def flip_page(path: Path) -> None:
    column = pq.read_metadata(path).row_group(0).column(3)
    assert column.path_in_schema.startswith("embedding")
    flip(path, column.data_page_offset + 5000)


def flip_key_page(path: Path) -> None:
    column = pq.read_metadata(path).row_group(0).column(0)
    flip(path, column.data_page_offset + column.total_compressed_size - 1)


def flip_footer(path: Path) -> None:
    size = int.from_bytes(path.read_bytes()[-8:-4], "little")
    flip(path, -8 - size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_parquet(path: Path) -> None:
    path.write_text("a,b\n1,2\n" * 100)


def foreign_parquet(path: Path) -> None:
    pq.write_table(pa.table({"key": [b"k" * 32] * 300, "x": range(300)}), path)


def other_fingerprint(path: Path) -> None:
    [other] = write(path.parent / "other", [entry(1)] * 300, OTHER)
    other.replace(path)
    shutil.rmtree(path.parent / "other")


def fewer_rows(path: Path) -> None:
    table = read_segment(Location.parse(path), FINGERPRINT.id, vector_schema())
    pq.write_table(table.slice(0, 10).replace_schema_metadata(pq.read_schema(path).metadata), path)


def rewrite(path: Path, table: pa.Table, **changes: object) -> None:
    """Another table as this segment; changes: to the metadata in its footer."""
    metadata = {**json.loads(pq.read_schema(path).metadata[b"batchverify"]), **changes}
    options: Any = {"row_group_size": 256, "compression": "none"}
    pq.write_table(table.replace_schema_metadata({b"batchverify": json.dumps(metadata)}), path, **options)


def vectors_of(value: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        table = read_segment(Location.parse(path), FINGERPRINT.id, vector_schema())
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.full((300, 512), value, np.float16))
        rewrite(path, table.set_column(3, vector_schema().field("embedding"), column))

    return damage


def boxes_without_end(path: Path) -> None:
    table = read_segment(Location.parse(path), FINGERPRINT.id, vector_schema())
    boxes = pa.FixedSizeListArray.from_arrays(np.full(1200, np.inf, np.float32), 4)
    rewrite(path, table.set_column(1, "box", boxes))


def deep_metadata(path: Path) -> None:
    table = read_segment(Location.parse(path), FINGERPRINT.id, vector_schema())
    rewrite(path, table, more=json.loads("[" * 500 + "]" * 500))


DAMAGES = [
    vectors_of(float("nan")),
    vectors_of(float("inf")),
    vectors_of(0.0),
    vectors_of(1.0),
    boxes_without_end,
    deep_metadata,
    flip_page,
    flip_key_page,
    flip_footer,
    cut,
    empty,
    not_parquet,
    foreign_parquet,
    other_fingerprint,
    fewer_rows,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_segment_is_skipped_and_logged_once(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    [path] = write(tmp_path, [entry(number) for number in range(300)])
    write(tmp_path, [entry(number) for number in range(300, 310)])
    damage(path)
    cache = open_cache(tmp_path)
    with caplog.at_level(logging.WARNING):
        for again in range(3):
            got = cache.get_many([key(0), key(305), key(1)])
            assert values(got) == values([None, entry(305), None])
            if again:
                cache.refresh()
    [record] = caplog.records
    assert str(path) in record.getMessage() and "segment skipped" in record.getMessage()
    assert cache.bad_segments == {str(path)}


def test_undamaged_row_groups_of_a_segment_are_served_until_the_damage_shows(tmp_path: Path) -> None:
    [path] = write(tmp_path, [entry(number) for number in range(300)])
    flip_page(path)
    cache = open_cache(tmp_path)
    assert values(cache.get_many([key(299)])) == values([entry(299)])
    assert cache.get_many([key(0), key(299)]) == [None, None]


def test_a_damaged_vector_leaves_the_failure_and_a_later_vector_serves(tmp_path: Path) -> None:
    [first] = write(tmp_path, [entry(1), entry(2, seed=8)])
    write(tmp_path, [failure(1)])
    write(tmp_path, [entry(2, seed=9)])
    flip_key_page(first)
    got = open_cache(tmp_path).get_many([key(1), key(2)])
    assert got[0] is not None and got[0].skipped is not None
    assert values(got[1:]) == values([entry(2, seed=9)])


@pytest.mark.parametrize("damage", [flip_footer, cut, empty, not_parquet, foreign_parquet])
def test_a_damaged_failure_segment_is_skipped(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    [path] = write(tmp_path, [failure(1)])
    write(tmp_path, [failure(2), entry(3)])
    damage(path)
    with caplog.at_level(logging.WARNING):
        got = open_cache(tmp_path).get_many([key(1), key(2), key(3)])
    assert [each and each.key for each in got] == [None, key(2), key(3)]
    assert len(caplog.records) == 1


def test_a_vector_embedded_again_is_served_despite_the_damage(tmp_path: Path) -> None:
    [path] = write(tmp_path, [entry(1)])
    flip_key_page(path)
    write(tmp_path, [entry(1, seed=4)])
    assert values(open_cache(tmp_path).get_many([key(1)])) == values([entry(1, seed=4)])


def test_entries_of_compacted_segments_are_found_again(tmp_path: Path) -> None:
    first = write(tmp_path, [entry(number) for number in range(5)])
    second = write(tmp_path, [entry(number) for number in range(5, 9)])
    cache = open_cache(tmp_path)
    cache.refresh()
    data = Location.parse(first[0].parent)
    merged = vector_table([entry(number) for number in range(9)], "compactor")
    write_segment(data, merged, data.parent.join("tmp"), fingerprint=FINGERPRINT.id)
    for path in (*first, *second):
        path.unlink()
    assert values(cache.get_many([key(8), key(0)])) == values([entry(8), entry(0)])
    assert not cache.bad_segments


@pytest.mark.parametrize("gone", ["one segment", "all"])
def test_entries_of_deleted_segments_are_missing(tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture) -> None:
    [first] = write(tmp_path, [entry(1)])
    write(tmp_path, [entry(2), failure(3)])
    cache = open_cache(tmp_path)
    cache.refresh()
    if gone == "all":
        shutil.rmtree(tmp_path)
    else:
        first.unlink()
    got = cache.get_many([key(1), key(2), key(3)])
    assert [each and each.key for each in got] == ([None] * 3 if gone == "all" else [None, key(2), key(3)])
    assert caplog.records == []


def test_a_row_group_without_end_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [path] = write(tmp_path, [entry(1)])
    table = read_segment(Location.parse(path), FINGERPRINT.id, vector_schema())
    rows = MOST_GROUP + 1
    # 4,097 equal rows take little space and much memory.
    metadata = pq.read_schema(path).metadata
    large = pa.concat_tables([table] * rows).combine_chunks().replace_schema_metadata(metadata)
    pq.write_table(large, path.with_name(path.name.replace("-r1.", f"-r{rows}.")), row_group_size=rows)
    path.unlink()
    assert open_cache(tmp_path).get_many([key(1)]) == [None]
    assert "a row group of more than 4,096 rows" in caplog.text


def test_long_messages_of_failures_are_cut(tmp_path: Path) -> None:
    write(tmp_path, [Entry(key(1), None, skipped=Skipped(Reason.NO_FACE, "x" * 10**6))])
    [got] = open_cache(tmp_path).get_many([key(1)])
    assert got is not None and got.skipped is not None and len(got.skipped.message) == MOST_MESSAGE


class Compacting(EmbeddingCache):
    """A cache whose segments are deleted right after every refresh, as by a very fast compactor."""

    def refresh(self) -> object:  # type: ignore[override]
        index = super().refresh()
        for path in segments(self.root):
            path.unlink()
        return index


def test_a_segment_that_is_gone_after_the_refresh_too_is_missing(tmp_path: Path) -> None:
    write(tmp_path, [entry(1)])
    index = open_cache(tmp_path).index
    write(tmp_path, [entry(1)])
    cache = Compacting(str(tmp_path), FINGERPRINT, index=index)
    Path(index.segments[0]).unlink()
    assert cache.get_many([key(1)]) == [None]


def test_an_index_with_wrong_rows_gives_no_wrong_vectors(tmp_path: Path) -> None:
    write(tmp_path, [entry(number) for number in range(4)])
    cache = open_cache(tmp_path)
    index = cache.refresh()
    index.row[:] = np.roll(index.row, 1)
    assert cache.get_many([key(number) for number in range(4)]) == [None] * 4
