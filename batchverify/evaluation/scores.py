"""Outputs of `score` as arrays: columns, reasons, run records, the truth, and the rows that name given images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.errors import ManifestError, UsageError, first_line
from batchverify.evaluation.document import Truth
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.heads.prior import BALANCED, Units
from batchverify.manifest.columns import (
    LABEL,
    TRUE_LABEL,
    cell_names,
    check_cells,
    check_label_type,
    is_text,
    read_labels,
    read_paths,
)
from batchverify.manifest.paths import ImageRoot, resolve_many, to_bytes
from batchverify.manifest.tables import TableFile, find_files
from batchverify.scoring.parquet import SUCCESS, parse_record, part_files, run_record
from batchverify.storage.location import Location
from batchverify.storage.object_store import retry

UNKNOWN = -1
OK = "ok"
PERSONS = ("person_a", "person_b")
NOT_STATED = "not stated"
# A source of truth: the labels of the reference run, whose name follows.
FROM_REFERENCE = f"{TRUE_LABEL} of the reference "
# Scored pairs looked up at a time.
BITE = 2_000_000


@dataclass(frozen=True)
class Scores:
    """N pairs of a run.

    probability, similarity: (N,) float32, NaN if not scored. truth: (N,) int8: 0 same, 1 different, -1
    unknown. reason: (N,) int16, indices into `reasons`, whose first is `ok`. threshold: of the run or `--threshold`.
    """

    file: ScoreFile
    probability: np.ndarray
    similarity: np.ndarray | None
    truth: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]
    threshold: float
    # Whether `probability` is one, and not the scaled score of another system.
    calibrated: bool = True
    # The share of same pairs for which the probabilities are.
    assumed: float = BALANCED

    def __len__(self) -> int:
        return len(self.probability)

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool."""
        return ~np.isnan(self.probability)

    @cached_property
    def calls(self) -> np.ndarray:
        """(N,) bool: called different, at or above the threshold as float32; False if not scored."""
        return self.probability >= np.float32(self.threshold)

    @property
    def labelled(self) -> np.ndarray:
        """The indices of the pairs whose truth is known."""
        return np.flatnonzero(self.truth != UNKNOWN)

    def labelled_pairs(self) -> MeasuredPairs:
        """The pairs whose truth is known, to be measured."""
        rows = self.labelled
        return self.pairs_at(rows, self.truth[rows])

    def pairs_at(self, rows: np.ndarray, truth: np.ndarray) -> MeasuredPairs:
        """Some pairs with a truth of theirs, to be measured. rows: (M,) indices. truth: (M,) 0 or 1."""
        return MeasuredPairs(truth, self.probability[rows], self.threshold, self.calibrated, self.assumed)

    def failures(self) -> dict[str, int]:
        """How many pairs were not scored, by reason, the most frequent first."""
        counts = np.bincount(self.reason[~self.scored], minlength=len(self.reasons))
        order = np.argsort(-counts, kind="stable")
        return {self.reasons[code]: int(counts[code]) for code in order if counts[code]}


def read_scores(file: ScoreFile, *, threshold: float | None = None, truth: np.ndarray | None = None) -> Scores:
    """Read the columns that every evaluation needs. truth: (N,) int8, by default the column `true_label`.

    Raises `ManifestError` for invalid columns, `UsageError` if there is no threshold.
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
    truth = truth if truth is not None else _truth(file)
    return Scores(file, probability, similarity, truth, reason, reasons, _threshold(file, threshold))


def _numbers(file: ScoreFile, name: str) -> np.ndarray:
    """(N,) float32, null as NaN."""
    chunks = [chunk.to_numpy(zero_copy_only=False) for chunk in file.column(name).chunks]
    return np.concatenate([np.zeros(0, np.float32), *chunks]).astype(np.float32, copy=False)


def _reasons(file: ScoreFile, failed: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int16 codes and their names; the reason of a failure with status `ok` or a blank one is not stated."""
    names = {OK: 0, NOT_STATED: 1}
    codes = np.zeros(len(failed), np.int16)
    if "status" in file.schema.names:
        cells = file.column("status", dictionary=True).unify_dictionaries().combine_chunks()
        table = [names.setdefault(name, len(names)) for name in cells.dictionary.to_pylist()]
        codes = np.array([*table, names[NOT_STATED]], np.int16)[cells.indices.fill_null(len(table)).to_numpy()]
    codes[failed & (codes == 0)] = names[NOT_STATED]
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
    threshold = given if given is not None else file.record.get("threshold")
    if threshold is None:
        raise UsageError(f"{file.name}: no run record with a threshold; give one with --threshold")
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise UsageError(f"{file.name}: the threshold must lie between 0 and 1, got {threshold!r}")
    return float(threshold)


def read_units(file: ScoreFile) -> Units:
    """What pairs have in common: people by `person_a` and `person_b`, images if these are blank or absent.

    Without columns of images each pair is a unit of its own.
    """
    if not set(file.sides) <= set(file.schema.names):
        rows = np.arange(file.rows, dtype=np.int32)
        return Units("pairs", rows, rows, file.rows)
    kind, sides = "images", file.table(file.sides).columns
    if set(PERSONS) <= set(file.schema.names):
        people = [cell_names(column) for column in file.table(PERSONS).columns]
        if any(names.null_count < len(names) for names in people):
            kind = "identities"
            # The prefix tells an image from a person of the same name.
            sides = [
                pc.coalesce(names, pc.binary_join_element_wise("\0", images.cast(pa.string()), ""))
                for names, images in zip(people, sides, strict=True)
            ]
    chunks = [chunk.cast(pa.large_string()) for side in sides for chunk in side.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).combine_chunks().dictionary_encode("encode")
    a, b = np.split(encoded.indices.to_numpy().astype(np.int32), 2)
    return Units(kind, a, b, len(encoded.dictionary))


def describe_truth(scores: Scores, source: str | None) -> Truth:
    """Where the truth comes from and how many pairs have which."""
    unknown, same, different = np.bincount(scores.truth - UNKNOWN, minlength=3).tolist()
    source = source or (TRUE_LABEL if len(scores.labelled) else None)
    return {"source": source, "unknown": unknown, "same": same, "different": different}


@dataclass(frozen=True)
class ScoreFile:
    """An output of `score`.

    parts: its Parquet files in order. part_rows: the rows of each. record: the run record, empty in a table of
    another program.
    """

    name: str
    parts: tuple[Location, ...]
    part_rows: tuple[int, ...]
    schema: pa.Schema
    record: Mapping[str, Any]

    @classmethod
    def open(cls, source: str) -> ScoreFile:
        """Find and check a file, a folder or a URI.

        Raises `ManifestError` if it is absent, unfinished, empty or not an output of `score`.
        """
        location = Location.parse(source)
        with _manifest_errors(source):
            kind = location.kind()
            if special := location.special():
                raise ManifestError(f"{source}: {special}; scores are read more than once: save them to a file")
            if kind == "absent":
                raise ManifestError(f"{source}: no such file or folder")
            parts = part_files(location) if kind == "folder" else [location]
            if not parts:
                raise ManifestError(f"{source}: the folder has no part files of `batchverify score`")
            footers = [_footer(part) for part in parts]
            record = _folder_record(location) if kind == "folder" else run_record(footers[0])
        schema = footers[0].schema.to_arrow_schema().remove_metadata()
        rows = tuple(footer.num_rows for footer in footers)
        opened = cls(source, tuple(parts), rows, schema, record)
        opened._check()
        return opened

    @property
    def rows(self) -> int:
        """The number of pairs."""
        return sum(self.part_rows)

    def written(self) -> str | None:
        """When the newest of its files was written, in UTC to the second; None if the store does not say."""
        with _manifest_errors(self.name):
            infos = retry(lambda: [part.filesystem.get_file_info(part.path) for part in self.parts])
        times = [info.mtime for info in infos if info.mtime is not None]
        return max(times).strftime("%Y-%m-%d %H:%M:%S UTC") if times else None

    @property
    def sides(self) -> tuple[str, str]:
        """The names of the two columns of image paths."""
        options = self.record.get("options") or {}
        a, b = (options.get(f"column_{side}", f"image_{side}") for side in "ab")
        return str(a), str(b)

    def column(self, name: str, *, dictionary: bool = False) -> pa.ChunkedArray:
        """A whole column. dictionary: texts dictionary-encoded, for columns of few values."""
        cells = self.table([name], dictionary=dictionary).column(0)
        if not dictionary or cells.type == pa.dictionary(pa.int32(), pa.string()):
            return cells
        # Parquet reads only plain strings as a dictionary, not the string types of pandas and polars.
        return cells.cast(pa.string()).dictionary_encode()

    def groups(self, name: str) -> pa.ChunkedArray:
        """A column whose values name groups of pairs.

        Raises `ManifestError` for lists, for structs and for texts that are not UTF-8.
        """
        self.require(name)
        kind = self.schema.field(name).type
        if pa.types.is_nested(kind):
            raise ManifestError(f"{self.name}: column '{name}' must hold single values, found {kind}")
        cells, row = self.column(name), 0
        for chunk in cells.chunks if is_text(kind) else []:
            check_cells(chunk, self.name, row, name)
            row += len(chunk)
        return cells

    def table(self, names: Sequence[str], *, dictionary: bool = False) -> pa.Table:
        """Some whole columns."""
        self.require(*names)
        tables = []
        for part in self.parts:
            with _opened(part) as file:
                encoded = list(names) if dictionary else []
                tables.append(pq.read_table(file, columns=list(names), read_dictionary=encoded))
        return pa.concat_tables(tables)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        self.require(*names)
        for part in self.parts:
            with _opened(part) as file:
                yield from pq.ParquetFile(file).iter_batches(columns=list(names))

    def take(self, rows: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows by index, in the order of `rows`; only the row groups that hold them are read."""
        self.require(*names)
        cells: dict[int, dict[str, Any]] = {}
        wanted, start = np.unique(rows), 0
        for part in self.parts:
            with _opened(part) as file:
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    inside = wanted[(wanted >= start) & (wanted < start + count)]
                    if len(inside):
                        table = parquet.read_row_group(group, columns=list(names))
                        chosen = table.take(pa.array(inside - start)).to_pylist()
                        cells |= dict(zip(inside.tolist(), chosen, strict=True))
                    start += count
        return [cells[row] for row in rows.tolist()]

    def require(self, *names: str) -> None:
        """Raise `ManifestError` for a missing column."""
        require_columns(self.name, self.schema, names)

    def _check(self) -> None:
        if "probability" not in self.schema.names:
            listed = ", ".join(self.schema.names) or "no columns"
            raise ManifestError(
                f"{self.name}: no column 'probability'; is it an output of `batchverify score`? The file has {listed}"
            )
        for name in ("probability", "similarity"):
            if name in self.schema.names and not pa.types.is_floating(self.schema.field(name).type):
                kind = self.schema.field(name).type
                raise ManifestError(f"{self.name}: column '{name}' must hold floating-point numbers, found {kind}")
        if "status" in self.schema.names and not is_text(self.schema.field("status").type):
            kind = self.schema.field("status").type
            raise ManifestError(f"{self.name}: column 'status' must hold reasons (strings), found {kind}")
        if not self.rows:
            raise ManifestError(f"{self.name}: the file has no rows, so there is nothing to evaluate")


def require_columns(name: str, schema: pa.Schema, columns: Iterable[str]) -> None:
    """Raise `ManifestError` for a column that a file lacks. name: of the file."""
    for column in columns:
        if column not in schema.names:
            listed = ", ".join(schema.names)
            raise ManifestError(f"{name}: no column '{column}'; the file has {listed}")


def _footer(part: Location) -> pq.FileMetaData:
    with _opened(part) as file:
        return pq.ParquetFile(file).metadata


def _folder_record(folder: Location) -> dict[str, Any]:
    marker = folder.join(SUCCESS)
    if marker.kind() == "absent":
        raise ManifestError(f"{folder}: no {SUCCESS} in the folder, so its run is not finished")
    return parse_record(marker.read_bytes())


@contextmanager
def _opened(part: Location) -> Iterator[pa.NativeFile]:
    with _manifest_errors(str(part)), retry(lambda: part.filesystem.open_input_file(part.path)) as file:
        yield file


@contextmanager
def _manifest_errors(name: str) -> Iterator[None]:
    """Raise pyarrow's errors as `ManifestError`."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ManifestError(f"{name}: no such file or folder") from exc
    except pa.ArrowInvalid as exc:
        raise ManifestError(
            f"{name}: not a readable Parquet file ({first_line(exc)}); `evaluate` takes outputs of `score`"
        ) from exc
    except (OSError, pa.ArrowException) as exc:
        raise ManifestError(f"{name}: cannot be read: {first_line(exc)}") from exc


def read_truth(manifest: str, scores: ScoreFile) -> np.ndarray:
    """(N,) int8: the truth of each pair in the scores, -1 if the manifest does not state it.

    Pairs are matched by the cells of their two image columns, in either order. Raises `ManifestError` for a
    manifest without labels, for a pair with two labels, and if no pair matches.
    """
    keys, labels = _labelled(manifest, scores.sides)
    codes = keys.dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    truth = labels[first]
    clash = np.flatnonzero(labels != truth[codes])
    if len(clash):
        pair = " and ".join(keys[int(clash[0])].as_py().split("\0"))
        raise ManifestError(f"{manifest}: the pair {pair} has label 0 in one row and 1 in another")
    distinct, matched = keys.take(pa.array(first)), []
    for wanted in _key_batches(scores):
        indices = pc.index_in(wanted, value_set=distinct).fill_null(-1).to_numpy()
        matched.append(np.where(indices >= 0, truth[indices], np.int8(UNKNOWN)))
    known = np.concatenate(matched)
    if (known == UNKNOWN).all():
        raise ManifestError(
            f"{manifest}: labels none of the pairs of {scores.name}; the cells of "
            f"{' and '.join(scores.sides)} must be equal in both files"
        )
    return known


def _key_batches(scores: ScoreFile) -> Iterator[pa.LargeStringArray]:
    """The keys of the scored pairs in large batches: each look-up indexes all labels anew."""
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
    for location in find_files(manifest):
        file, row = TableFile(location), 0
        schema = file.schema()
        require_columns(str(location), schema, (*sides, LABEL))
        check_label_type(str(location), schema.field(LABEL).type)
        for batch in file.batches(schema):
            paths = [read_paths(batch.column(name), str(location), row, name) for name in sides]
            cells = read_labels(batch.column(LABEL), str(location), row)
            keys.append(_keys(*paths).filter(cells.is_valid()))
            labels.append(cells.drop_null().to_numpy())
            row += batch.num_rows
    if not sum(map(len, keys)):
        raise ManifestError(f"{manifest}: no row has a label")
    return pa.concat_arrays(keys), np.concatenate(labels).astype(np.int8)


def _keys(a: pa.Array, b: pa.Array) -> pa.LargeStringArray:
    """One text for each pair, the same for (a, b) and (b, a), joined by NUL, which no path contains."""
    # Large strings, because ten million pairs have more than 2 GiB of paths.
    a, b = (each.cast(pa.large_string()).fill_null("") for each in (a, b))
    swapped = pc.greater(a, b)
    ends = pc.if_else(swapped, b, a), pc.if_else(swapped, a, b)
    return pc.binary_join_element_wise(*ends, pa.scalar("\0", pa.large_string()))


@dataclass(frozen=True)
class Appearances:
    """rows: rows of `output` that name at least one of the images. images: how many of the images it names."""

    output: str
    rows: int
    images: int


def find_appearances(output: str, images: Collection[str]) -> Appearances:
    """Look for images, absolute paths or URIs, in an output of `score`; nothing is changed.

    Relative paths in the output start where its run record says. Raises `ManifestError` if it is not a finished
    output.
    """
    scores = ScoreFile.open(output)
    roots = scores.record.get("job", {}).get("image_root") or "."
    finders = [ImageRoot(Location.parse(root)) for root in ([roots] if isinstance(roots, str) else roots)]
    wanted = pa.array(sorted(map(to_bytes, images)), pa.large_binary())
    rows, seen = 0, np.zeros(len(wanted), np.bool_)
    for batch in scores.batches(scores.sides):
        hit = np.zeros(batch.num_rows, np.bool_)
        for cells in batch.columns:
            for finder in finders:
                found = pc.index_in(resolve_many(finder, cells.cast(pa.string())), value_set=wanted)
                hit |= found.is_valid().to_numpy(zero_copy_only=False)
                seen[found.drop_null().to_numpy()] = True
        rows += int(hit.sum())
    return Appearances(output, rows, int(seen.sum()))
