"""Finished outputs as arrays: columns, reasons, run records, and the truth from labels of their own or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.errors import ManifestError, UsageError, first_line
from batchverify.evaluation.bootstrap import Units
from batchverify.manifest.columns import (
    LABEL,
    TRUE_LABEL,
    cell_names,
    check_label_type,
    is_text,
    read_labels,
    read_paths,
)
from batchverify.manifest.tables import TableFile, find_files
from batchverify.scoring.parquet import SUCCESS, parse_record, part_files, run_record
from batchverify.storage.location import Location

UNKNOWN = -1
OK = "ok"
PERSONS = ("person_a", "person_b")
NOT_STATED = "not stated"
# Scored pairs searched for at once.
BITE = 2_000_000


@dataclass(frozen=True)
class Scores:
    """N pairs of a run.

    probability, similarity: (N,) float32, NaN where not scored. truth: (N,) int8: 0 same, 1 different, -1
    unknown. reason: (N,) int16 into `reasons`, whose first is `ok`. threshold: of the run, or the one given.
    """

    file: ScoreFile
    probability: np.ndarray
    similarity: np.ndarray | None
    truth: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]
    threshold: float

    def __len__(self) -> int:
        return len(self.probability)

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool."""
        return ~np.isnan(self.probability)

    @cached_property
    def calls(self) -> np.ndarray:
        """(N,) bool: called different, at or above the threshold as float32; false where not scored."""
        return self.probability >= np.float32(self.threshold)

    @property
    def labelled(self) -> np.ndarray:
        """The places of the pairs whose truth is known."""
        return np.flatnonzero(self.truth != UNKNOWN)

    def failures(self) -> dict[str, int]:
        """How many pairs were not scored, by the first side's reason, the most frequent first."""
        counts = np.bincount(self.reason[~self.scored], minlength=len(self.reasons))
        named = [(name, int(count)) for name, count in zip(self.reasons, counts, strict=True) if count]
        return dict(sorted(named, key=lambda each: -each[1]))


def read_scores(
    file: ScoreFile, *, threshold: float | None = None, truth: np.ndarray | None = None
) -> Scores:
    """Read what every evaluation needs. truth: (N,) int8 from elsewhere; by default the column `true_label`.

    Raises `ManifestError` for columns that hold something else, `UsageError` where no threshold is known.
    """
    probability = _numbers(file, "probability")
    if np.nanmin(probability, initial=0) < 0 or np.nanmax(probability, initial=0) > 1:
        row = int(np.flatnonzero((probability < 0) | (probability > 1))[0])
        raise ManifestError(
            f"{file.name}: row {row + 1}: probability must lie between 0 and 1, got {probability[row]:g}"
        )
    similarity = _numbers(file, "similarity") if "similarity" in file.schema.names else None
    if similarity is not None and np.isinf(similarity).any():
        row = int(np.flatnonzero(np.isinf(similarity))[0])
        raise ManifestError(f"{file.name}: row {row + 1}: similarity must be a number, got {similarity[row]}")
    reason, reasons = _reasons(file, np.isnan(probability))
    known = truth if truth is not None else _truth(file)
    return Scores(file, probability, similarity, known, reason, reasons, _threshold(file, threshold))


def _numbers(file: ScoreFile, name: str) -> np.ndarray:
    """(N,) float32, null as NaN."""
    parts = [each.to_numpy(zero_copy_only=False) for each in file.column(name).chunks]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32, copy=False)


def _reasons(file: ScoreFile, failed: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int16 and the names that it counts; a failure whose reason is `ok` or blank has none stated."""
    names = {OK: 0, NOT_STATED: 1}
    codes = np.zeros(len(failed), np.int16)
    if "status" in file.schema.names:
        start = 0
        for chunk in file.column("status", dictionary=True).chunks:
            table = np.array(
                [names.setdefault(each, len(names)) for each in chunk.dictionary.to_pylist()] + [1]
            )
            places = chunk.indices.fill_null(len(table) - 1).to_numpy()
            codes[start : start + len(chunk)] = table[places]
            start += len(chunk)
    codes[failed & (codes == 0)] = 1
    return codes, tuple(names)


def _truth(file: ScoreFile) -> np.ndarray:
    if TRUE_LABEL not in file.schema.names:
        return np.full(file.rows, UNKNOWN, np.int8)
    check_label_type(file.name, file.schema.field(TRUE_LABEL).type, TRUE_LABEL)
    parts, row = [np.zeros(0, np.int8)], 0
    for batch in file.batches([TRUE_LABEL]):
        parts.append(read_labels(batch.column(0), file.name, row).fill_null(UNKNOWN).to_numpy())
        row += batch.num_rows
    return np.concatenate(parts)


def _threshold(file: ScoreFile, given: float | None) -> float:
    stated = given if given is not None else file.record.get("threshold")
    if stated is None:
        raise UsageError(
            f"{file.name}: holds no run record that states a threshold; give one with --threshold"
        )
    if not isinstance(stated, int | float) or not 0 <= stated <= 1:
        raise UsageError(f"{file.name}: a threshold lies between 0 and 1, got {stated!r}")
    return float(stated)


def read_units(file: ScoreFile) -> Units:
    """Whom the pairs share: the people of `person_a` and `person_b`, images where these are blank or absent.

    In a table with neither each pair stands for itself.
    """
    if not set(file.sides) <= set(file.schema.names):
        places = np.arange(file.rows, dtype=np.int32)
        return Units("pairs", places, places, file.rows)
    images = file.table(file.sides)
    named = [name for name in PERSONS if name in file.schema.names]
    sides = [images.column(0), images.column(1)]
    kind = "images"
    if len(named) == len(PERSONS):
        people = file.table(PERSONS)
        texts = [cell_names(people.column(side)) for side in (0, 1)]
        if any(each.null_count < len(each) for each in texts):
            kind = "identities"
            # A person and a picture of one name are not the same.
            sides = [
                pc.coalesce(text, pc.binary_join_element_wise("\0", side.cast(pa.string()), ""))
                for text, side in zip(texts, sides, strict=True)
            ]
    codes, count = encode([*sides])
    return Units(kind, codes[0], codes[1], count)


def encode(sides: list[pa.ChunkedArray]) -> tuple[list[np.ndarray], int]:
    """Columns of texts as numbers from one dictionary: (N,) int32 each, and how many there are."""
    chunks = [chunk.cast(pa.large_string()) for side in sides for chunk in side.chunks]
    joined = pa.chunked_array(chunks, pa.large_string()).combine_chunks().dictionary_encode("encode")
    codes = joined.indices.to_numpy().astype(np.int32)
    return np.split(codes, np.cumsum([len(side) for side in sides])[:-1]), len(joined.dictionary)


def describe_truth(scores: Scores, source: str | None) -> Mapping[str, Any]:
    """Where the truth comes from and how many pairs have which."""
    counts = np.bincount(scores.truth + 1, minlength=3)
    names = ("unknown", "same", "different")
    found = {name: int(count) for name, count in zip(names, counts, strict=True)}
    return {"source": source or (TRUE_LABEL if len(scores.labelled) else None), **found}


@dataclass(frozen=True)
class ScoreFile:
    """An output of `score`. record: the run's, empty in a table that another program wrote.

    parts: its Parquet files in order; part_rows: the rows of each.
    """

    name: str
    parts: tuple[Location, ...]
    part_rows: tuple[int, ...]
    schema: pa.Schema
    record: Mapping[str, Any]

    @classmethod
    def open(cls, source: str) -> ScoreFile:
        """Find and check a file, a folder or a URI.

        Raises `ManifestError` for what is absent, unfinished, empty or no output of `score`.
        """
        location = Location.parse(source)
        with _seam(source):
            kind = location.kind()
            if kind == "absent":
                raise ManifestError(f"{source}: no such file or folder")
            parts = part_files(location) if kind == "folder" else [location]
            if not parts:
                raise ManifestError(f"{source}: the folder holds no part files of `batchverify score`")
            footers = [_footer(part) for part in parts]
            record = _folder_record(location) if kind == "folder" else run_record(footers[0])
        schema = footers[0].schema.to_arrow_schema().remove_metadata()
        rows = tuple(footer.num_rows for footer in footers)
        opened = cls(source, tuple(parts), rows, schema, record)
        opened._check()
        return opened

    @property
    def rows(self) -> int:
        """How many pairs."""
        return sum(self.part_rows)

    def written(self) -> str | None:
        """When the newest of its files was written, in UTC to the second; None where the store does not say."""
        with _seam(self.name):
            infos = [part.filesystem.get_file_info(part.path) for part in self.parts]
        times = [info.mtime for info in infos if info.mtime is not None]
        return max(times).strftime("%Y-%m-%d %H:%M:%S UTC") if times else None

    @property
    def sides(self) -> tuple[str, str]:
        """The names of the two columns that hold the pictures' paths."""
        options = self.record.get("options", {})
        return options.get("column_a", "image_a"), options.get("column_b", "image_b")

    def column(self, name: str, *, dictionary: bool = False) -> pa.ChunkedArray:
        """One column, whole. dictionary: texts as a dictionary and indices, for columns of few values."""
        cells = self.table([name], dictionary=dictionary).column(0)
        # Texts of other types, as pandas and polars write them, are read as they stand.
        return cells.cast(pa.string()).dictionary_encode() if dictionary and not _coded(cells.type) else cells

    def groups(self, name: str) -> pa.ChunkedArray:
        """A column whose values name groups of pairs; `ManifestError` for one of lists or structs."""
        self.require(name)
        kind = self.schema.field(name).type
        if pa.types.is_nested(kind):
            raise ManifestError(f"{self.name}: column '{name}' must hold single values, found {kind}")
        return self.column(name)

    def table(self, names: Sequence[str], *, dictionary: bool = False) -> pa.Table:
        """Some columns, whole."""
        self.require(*names)
        tables = []
        for part in self.parts:
            with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
                as_codes = list(names) if dictionary else []
                tables.append(pq.read_table(file, columns=list(names), read_dictionary=as_codes))
        return pa.concat_tables(tables)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        self.require(*names)
        for part in self.parts:
            with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
                yield from pq.ParquetFile(file).iter_batches(columns=list(names))

    def take(self, rows: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows by their numbers, in the order asked for; only the row groups that hold them are read."""
        self.require(*names)
        found: dict[int, dict[str, Any]] = {}
        wanted = np.unique(rows)
        start = 0
        for part in self.parts:
            with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    here = wanted[(wanted >= start) & (wanted < start + count)]
                    if len(here):
                        table = parquet.read_row_group(group, columns=list(names)).take(
                            pa.array(here - start)
                        )
                        found |= dict(zip(here.tolist(), table.to_pylist(), strict=True))
                    start += count
        return [found[row] for row in rows.tolist()]

    def require(self, *names: str) -> None:
        """Raise `ManifestError` for a column that is not there."""
        for name in names:
            if name not in self.schema.names:
                listed = ", ".join(self.schema.names)
                raise ManifestError(f"{self.name}: no column '{name}'; the file has {listed}")

    def _check(self) -> None:
        if "probability" not in self.schema.names:
            listed = ", ".join(self.schema.names) or "no columns"
            raise ManifestError(
                f"{self.name}: no column 'probability'; is it an output of `batchverify score`? "
                f"The file has {listed}"
            )
        for name in ("probability", "similarity"):
            if name in self.schema.names and not pa.types.is_floating(self.schema.field(name).type):
                kind = self.schema.field(name).type
                raise ManifestError(
                    f"{self.name}: column '{name}' must hold floating-point numbers, found {kind}"
                )
        if "status" in self.schema.names and not is_text(self.schema.field("status").type):
            kind = self.schema.field("status").type
            raise ManifestError(f"{self.name}: column 'status' must hold reasons (strings), found {kind}")
        if not self.rows:
            raise ManifestError(f"{self.name}: the file has no rows: there is nothing to evaluate")


def _coded(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)


def _footer(part: Location) -> pq.FileMetaData:
    with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
        return pq.ParquetFile(file).metadata


def _folder_record(folder: Location) -> dict[str, Any]:
    marker = folder.join(SUCCESS)
    if marker.kind() == "absent":
        raise ManifestError(f"{folder}: no {SUCCESS} in it: the run that writes it is not finished")
    with marker.filesystem.open_input_file(marker.path) as file:
        return parse_record(file.read())


@contextmanager
def _seam(name: str) -> Iterator[None]:
    """pyarrow's errors as ours."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ManifestError(f"{name}: no such file or folder") from exc
    except pa.ArrowInvalid as exc:
        raise ManifestError(
            f"{name}: not a readable Parquet file ({first_line(exc)}); `evaluate` takes what `score` wrote"
        ) from exc
    except (OSError, pa.ArrowException) as exc:
        raise ManifestError(f"{name}: cannot be read: {first_line(exc)}") from exc


def read_truth(manifest: str, scores: ScoreFile) -> np.ndarray:
    """(N,) int8: the truth of each scored pair, -1 where the manifest does not state it.

    Pairs are found by the cells of their two image columns, in either order. Raises `ManifestError` for a
    manifest without labels, for pairs with two labels, and where no pair is found.
    """
    keys, labels = _labelled(manifest, scores.sides)
    names, first = _unique(keys)
    truth = labels[first]
    clash = np.flatnonzero(labels != truth[names])
    if len(clash):
        pair = " and ".join(keys[int(clash[0])].as_py().split("\0"))
        raise ManifestError(f"{manifest}: the pair {pair} has label 0 in one row and 1 in another")
    distinct = keys.take(pa.array(first))
    found = []
    for wanted in _bites(scores):
        places = pc.index_in(wanted, value_set=distinct).fill_null(-1).to_numpy()
        found.append(np.where(places >= 0, truth[places], np.int8(UNKNOWN)))
    known = np.concatenate(found)
    if (known == UNKNOWN).all():
        raise ManifestError(
            f"{manifest}: labels none of the pairs of {scores.name}; pairs are found by the cells of "
            f"{' and '.join(scores.sides)}, which must be equal"
        )
    return known


def _bites(scores: ScoreFile) -> Iterator[pa.LargeStringArray]:
    """The keys of the scored pairs, many at a time: every search makes an index of all labels anew."""
    keys: list[pa.LargeStringArray] = []
    for batch in scores.batches(scores.sides):
        keys.append(_keys(batch.column(0), batch.column(1)))
        if sum(map(len, keys)) >= BITE:
            yield pa.concat_arrays(keys)
            keys = []
    if keys:
        yield pa.concat_arrays(keys)


def _labelled(manifest: str, sides: tuple[str, str]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The keys and labels of a manifest's rows that have one."""
    keys, labels = [], []
    for key, label in _rows(manifest, sides):
        stated = label.is_valid()
        keys.append(key.filter(stated))
        labels.append(label.filter(stated).to_numpy())
    if not sum(map(len, keys)):
        raise ManifestError(f"{manifest}: no row has a label")
    return pa.concat_arrays(keys), np.concatenate(labels).astype(np.int8)


def _rows(manifest: str, sides: tuple[str, str]) -> Iterator[tuple[pa.LargeStringArray, pa.Int8Array]]:
    for location in find_files(manifest):
        file, row = TableFile(location), 0
        schema = file.schema()
        for name in (*sides, LABEL):
            if name not in schema.names:
                listed = ", ".join(schema.names)
                raise ManifestError(f"{location}: no column '{name}'; the file has {listed}")
        check_label_type(str(location), schema.field(LABEL).type)
        for batch in file.batches(schema):
            paths = [read_paths(batch.column(name), str(location), row, name) for name in sides]
            yield _keys(*paths), read_labels(batch.column(LABEL), str(location), row)
            row += batch.num_rows


def _keys(a: pa.Array, b: pa.Array) -> pa.LargeStringArray:
    """One text a pair, the same for (a, b) and (b, a); NUL is in no path."""
    # Large: ten million pairs have more than 2 GiB of paths.
    a, b = (each.cast(pa.large_string()).fill_null("") for each in (a, b))
    swapped = pc.greater(a, b)
    ends = pc.if_else(swapped, b, a), pc.if_else(swapped, a, b)
    return pc.binary_join_element_wise(*ends, pa.scalar("\0", pa.large_string()))


def _unique(keys: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the number of each key among the distinct ones, and (D,) where each of those stands first."""
    names = keys.dictionary_encode().indices.to_numpy()
    return names, np.unique(names, return_index=True)[1]
