"""Segments: written entries come back bit for bit; untrustworthy files are refused with a reason."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_samples import entry, failure, flip, key, values, vector

from batchverify.cache.segment import (
    DAMAGE,
    METADATA_KEY,
    Entry,
    SegmentName,
    failure_schema,
    failure_table,
    key_bytes,
    read_rows,
    read_segment,
    short_keys,
    table_failures,
    vector_column,
    vector_schema,
    vector_table,
    write_segment,
)
from batchverify.fingerprint import DIMENSION
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location

ID = "0123456789abcdef" * 2


def write(folder: Path, table: pa.Table, fingerprint: str = ID) -> Location:
    place = Location.parse(folder)
    return write_segment(place, table, place, fingerprint=fingerprint, compute_path="cpu fp32 64")


def foreign(folder: Path, table: pa.Table, name: str, metadata: dict | None = None) -> Location:
    path = folder / name
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return Location.parse(path)


def read(location: Location, schema: pa.Schema | None = None) -> pa.Table:
    return read_segment(location, ID, schema or vector_schema())


def test_vectors_come_back_bit_for_bit(tmp_path: Path) -> None:
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, 65504.0] * 74, np.float16)[:512]
    written = [*(entry(number) for number in range(600)), Entry(key(600), odd, (-1.5, 0, 1e9, 2), 0.25, 7)]
    location = write(tmp_path, vector_table(written, "run"))
    rows = np.array([600, 0, 255, 256, 599, 256])
    assert values(read_rows(location, ID, DIMENSION, rows)) == values([written[row] for row in rows])
    table = read(location)
    assert vector_column(table).tobytes() == b"".join(each.vector.tobytes() for each in written)
    assert key_bytes(table) == b"".join(each.key for each in written)
    assert read_rows(location, ID, DIMENSION, np.zeros(0, np.int64)) == []


def test_an_entry_keeps_no_row_group_in_memory(tmp_path: Path) -> None:
    location = write(tmp_path, vector_table([entry(number) for number in range(9)], "run"))
    [got] = read_rows(location, ID, DIMENSION, np.array([3]))
    assert got.vector is not None and got.vector.base is None


def test_float32_vectors_are_rounded_and_many_faces_fit(tmp_path: Path) -> None:
    exact = vector(1).astype(np.float32) + np.float32(1e-6)
    location = write(tmp_path, vector_table([Entry(key(1), exact, faces=100_000)], "run"))
    [got] = read_rows(location, ID, DIMENSION, np.array([0]))
    assert got.vector is not None and got.vector.tobytes() == exact.astype(np.float16).tobytes()
    assert got.faces == 32767 and np.isnan(got.confidence)


def test_the_layout_of_the_file(tmp_path: Path) -> None:
    location = write(tmp_path, vector_table([entry(number) for number in range(300)], "run 7"))
    file = pq.ParquetFile(location.path)
    assert file.schema_arrow.field("embedding").type == pa.fixed_shape_tensor(pa.float16(), [512])
    assert not file.schema_arrow.field("embedding").nullable
    assert [file.metadata.row_group(group).num_rows for group in range(2)] == [256, 44]
    group = file.metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {each.compression for each in columns} == {"UNCOMPRESSED"}
    assert [each.path_in_schema for each in columns if each.is_stats_set] == ["key"]
    assert not any(each.has_dictionary_page for each in columns)
    footer = json.loads(file.schema_arrow.metadata[METADATA_KEY])
    assert footer == {"fingerprint": ID, "compute_path": "cpu fp32 64"}
    assert set(read(location).column("run_id").to_pylist()) == {"run 7"}


def test_names_sort_by_time_and_state_the_rows(tmp_path: Path) -> None:
    names = [write(tmp_path, vector_table([entry(1)] * rows, "run")).name for rows in (1, 2, 3)]
    assert names == sorted(names)
    parsed = [SegmentName.parse(name) for name in names]
    assert [each.rows for each in parsed if each] == [1, 2, 3]
    assert sorted(each.name for each in tmp_path.iterdir()) == names


@pytest.mark.parametrize("name", ["a.parquet", "1-a-b-r3.parquet", ".x.tmp", f"{0:020d}-h_1-0123456g-r3.parquet"])
def test_names_that_are_no_segments(name: str) -> None:
    assert SegmentName.parse(name) is None


def test_failures_come_back_with_what_they_depend_on(tmp_path: Path) -> None:
    written = [failure(1), failure(2, Reason.TOO_LARGE, "pixels 5"), failure(3, Reason.UNDECODABLE, "jpeg")]
    location = write(tmp_path, failure_table(written, "run"))
    assert table_failures(read(location, failure_schema())) == {
        key(1): Skipped(Reason.NO_FACE, "message 1", ""),
        key(2): Skipped(Reason.TOO_LARGE, "message 2", "pixels 5"),
        key(3): Skipped(Reason.UNDECODABLE, "message 3", "jpeg"),
    }


def test_reasons_that_are_not_cached_are_ignored(tmp_path: Path) -> None:
    # From a later version, or from one that cached a crash.
    table = failure_table([failure(1), failure(2), failure(3, Reason.CRASHED)], "run")
    table = table.set_column(1, "reason", pa.array(["no_face", "too_blurred", "crashed"]))
    assert list(table_failures(read(write(tmp_path, table), failure_schema()))) == [key(1)]


def test_short_keys_keep_trailing_zero_bytes_apart() -> None:
    keys = [b"\x01" + bytes(31), b"\x01\x00\x02" + bytes(29), bytes(32), bytes(31) + b"\x01"]
    short = short_keys(vector_table([Entry(each, vector(1)) for each in keys], "run"))
    assert short.dtype == "S16" and short.tobytes() == b"".join(each[:16] for each in keys)
    assert [list(short == each).count(True) for each in short] == [1, 1, 2, 2]


def test_keys_of_sliced_and_chunked_tables() -> None:
    table = vector_table([entry(number) for number in range(10)], "run")
    pieces = pa.concat_tables([table.slice(7), table.slice(2, 3)])
    expected = [key(number) for number in (7, 8, 9, 2, 3, 4)]
    assert key_bytes(pieces) == b"".join(expected)
    assert short_keys(table.slice(0, 0)).shape == (0,)


def test_a_flipped_bit_in_any_page_is_noticed(tmp_path: Path) -> None:
    location = write(tmp_path, vector_table([entry(number) for number in range(300)], "run"))
    columns = pq.read_metadata(location.path).row_group(1)
    for number in range(columns.num_columns):
        column = columns.column(number)
        offset = column.data_page_offset + column.total_compressed_size - 1
        flip(Path(location.path), offset)
        with pytest.raises(DAMAGE):
            read(location)
        flip(Path(location.path), offset)
    assert read(location).num_rows == 300


def test_no_flipped_bit_in_a_footer_gives_other_values(tmp_path: Path) -> None:
    location = write(tmp_path, vector_table([entry(number) for number in range(5)], "run"))
    path = Path(location.path)
    whole, columns = read(location), ["key", "embedding", "box", "confidence", "faces"]
    size = int.from_bytes(path.read_bytes()[-8:-4], "little") + 8
    refused = 0
    # Flipping bit 3 can change a row group's row count, which Arrow itself does not notice.
    for offset in range(-size, 0):
        flip(path, offset, bit=3)
        try:
            assert read(location).select(columns).equals(whole.select(columns)), offset
        except DAMAGE:
            refused += 1
        flip(path, offset, bit=3)
    assert refused > size / 4


@pytest.mark.parametrize("keep", [0, 3, 8, 1000, -1, -400])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    location = write(tmp_path, vector_table([entry(number) for number in range(5)], "run"))
    path = Path(location.path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DAMAGE):
        read(location)


def test_an_absent_file_is_not_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(Location.parse(tmp_path / "gone.parquet"))


NAME = f"{1:020d}-host_1-01234567-r2.parquet"
OURS = {METADATA_KEY: json.dumps({"fingerprint": ID})}


def changed(column: str, kind: pa.DataType) -> pa.Table:
    table = vector_table([entry(1), entry(2)], "run")
    index = table.schema.get_field_index(column)
    return table.set_column(index, column, pa.nulls(2, kind))


def strict(column: str) -> pa.Table:
    """A table with a column that may hold no null, which old pyarrow releases misread."""
    table = vector_table([entry(1), entry(2)], "run")
    return table.cast(pa.schema([each.with_nullable(each.name != column) for each in table.schema]))


@pytest.mark.parametrize(
    ("table", "name", "metadata", "message"),
    [
        (pa.table({"key": ["a"]}), NAME, None, "its footer states no fingerprint"),
        (pa.table({"key": ["a"]}), NAME, {METADATA_KEY: "[1]"}, "its footer states no fingerprint"),
        (pa.table({"key": ["a"]}), NAME, {METADATA_KEY: "{"}, "Expecting property name"),
        (
            pa.table({"key": ["a"]}),
            NAME,
            {METADATA_KEY: '{"fingerprint": "f"}'},
            "footer states fingerprint f",
        ),
        (pa.table({"key": ["a"]}), NAME, OURS, "has 1 rows, which its name does not state"),
        (changed("key", pa.string()), NAME, OURS, "column key is string, not fixed_size_binary"),
        (changed("key", pa.binary(16)), NAME, OURS, r"column key is fixed_size_binary\[16\], not"),
        (
            changed("embedding", pa.list_(pa.float16(), 512)),
            NAME,
            OURS,
            "column embedding is fixed_size_list",
        ),
        (
            vector_table([Entry(key(1), np.ones(4, np.float16))] * 2, "run"),
            NAME,
            OURS,
            "column embedding is extension",
        ),
        (strict("key"), NAME, OURS, "not null, not fixed_size_binary"),
        (changed("key", pa.binary(32)), NAME, OURS, "column key has nulls"),
        (changed("faces", pa.int16()), NAME, OURS, "column faces has nulls"),
        (changed("box", pa.int8()).drop_columns(["box"]), NAME, OURS, "column box is missing"),
        (vector_table([entry(1), entry(2)], "run"), "x-r2.parquet", OURS, "which its name does not state"),
    ],
)
def test_foreign_parquet_is_refused(
    tmp_path: Path, table: pa.Table, name: str, metadata: dict | None, message: str
) -> None:
    with pytest.raises(DAMAGE, match=message):
        read(foreign(tmp_path, table, name, metadata))


def test_a_segment_of_another_fingerprint_is_refused(tmp_path: Path) -> None:
    location = write(tmp_path, vector_table([entry(1)], "run"), "f" * 32)
    with pytest.raises(ValueError, match="states fingerprint ffff"):
        read(location)


def test_other_row_groups_and_more_columns_are_read(tmp_path: Path) -> None:
    written = [entry(number) for number in range(20)]
    table = vector_table(written, "run").append_column("later", pa.nulls(20, pa.string()))
    path = tmp_path / f"{1:020d}-host_1-01234567-r20.parquet"
    pq.write_table(table.replace_schema_metadata(OURS), path, row_group_size=7)
    got = read_rows(Location.parse(path), ID, DIMENSION, np.array([19, 6, 7, 0, 13, 14]))
    assert values(got) == values([written[row] for row in (19, 6, 7, 0, 13, 14)])
