"""The groups of people that pairs belong to, from columns of the scores or from a table of people."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import ManifestError
from batchverify.evaluation.scores import PERSONS, ScoreFile, require_columns
from batchverify.manifest.columns import cell_names, check_cells, is_text, quoted, type_text
from batchverify.manifest.tables import TableFile, find_files
from batchverify.options import EvaluateOptions

# The column of a table of people that names the person.
PERSON = "person"
# More make a matrix that nobody can read, of cells without errors.
MOST_GROUPS = 50
# People named in a message.
EXAMPLES = 3


@dataclass(frozen=True)
class Groups:
    """The group of each side of N pairs.

    source: where they come from, for readers. names: of the G groups. a, b: (N,) int16, indices into `names`, -1
    if not stated. missing: people of the scores that the table of people lacks.
    """

    source: str
    names: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    missing: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        """The unordered pairs of groups: G (G + 1) / 2."""
        return len(self.names) * (len(self.names) + 1) // 2

    def table(self) -> np.ndarray:
        """(G, G) int64, symmetric: the cell of each pair of groups."""
        table = np.zeros((len(self.names),) * 2, np.int64)
        upper = np.triu_indices(len(self.names))
        table[upper] = np.arange(self.cells)
        return np.maximum(table, table.T)

    def cell_of_pairs(self) -> np.ndarray:
        """(N,) int64: the cell of each pair; `cells` if a side's group is not stated."""
        # Index -1 is the last row and column.
        return np.pad(self.table(), (0, 1), constant_values=self.cells)[self.a, self.b]


def read_groups(file: ScoreFile, options: EvaluateOptions) -> Groups | None:
    """The groups that the options ask for; None if they ask for none.

    Raises `ManifestError` for absent columns, for a table of people that contradicts itself or names none of the
    scores' people, and for a column that states no group or too many.
    """
    if options.group_a is not None and options.group_b is not None:
        columns = (options.group_a, options.group_b)
        sides = [cell_names(file.groups(name)) for name in columns]
        shown = " and ".join(dict.fromkeys(f"'{name}'" for name in columns))
        return _encoded(f"{file.name}: {shown}", sides)
    if options.people is not None and options.group is not None:
        return _joined(file, options.people, options.group)
    return None


def _encoded(source: str, sides: list[pa.ChunkedArray], missing: tuple[str, ...] = ()) -> Groups:
    """The groups of both sides by number. sides: two arrays of names, null if not stated."""
    chunks = [chunk for side in sides for chunk in side.chunks]
    encoded = pa.chunked_array(chunks, pa.string()).dictionary_encode().combine_chunks()
    texts = encoded.dictionary.to_pylist()
    if not texts:
        raise ManifestError(f"{source}: no group is stated")
    if len(texts) > MOST_GROUPS:
        few = ", ".join(map(quoted, texts[:EXAMPLES]))
        raise ManifestError(
            f"{source}: {len(texts):,} groups ({few}, …), at most {MOST_GROUPS} are compared; put them together "
            "first, ages into ranges"
        )
    names = _ordered(texts)
    codes = np.array([*(names.index(text) for text in texts), -1], np.int16)
    a, b = np.split(codes[encoded.indices.fill_null(len(texts)).to_numpy()], 2)
    return Groups(source, tuple(names), a, b, missing)


def _ordered(names: list[str]) -> list[str]:
    """Numbers in ascending order, other names by the alphabet."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    return sorted(names, key=lambda name: (math.isnan(numbers[name]), numbers[name], name))


def _joined(file: ScoreFile, source: str, column: str) -> Groups:
    """The groups of the scores' people by a table of people."""
    persons, groups = read_people(source, column)
    sides, absent = [], set[str]()
    for cells in file.table(PERSONS).columns:
        names = cell_names(cells)
        found = pc.index_in(names, value_set=persons, skip_nulls=True)
        lost = pc.and_(names.is_valid(), found.is_null())
        absent |= set(pc.unique(names.filter(lost)).to_pylist())
        sides.append(groups.take(found))
    if all(side.null_count == len(side) for side in sides) and absent:
        few = ", ".join(map(quoted, sorted(absent)[:EXAMPLES]))
        raise ManifestError(
            f"{source}: states a group of none of the people in {file.name} ({few}, …); the names in its column "
            f"'{PERSON}' must equal those in {' and '.join(PERSONS)}"
        )
    return _encoded(f"{source}: '{column}'", sides, tuple(sorted(absent)))


def read_people(source: str, column: str) -> tuple[pa.StringArray, pa.StringArray]:
    """The distinct people of a table (CSV, TSV or Parquet; a file, a folder or a glob), and the group of each.

    Raises `ManifestError` for an absent column, a row without a person, and a person with two groups.
    """
    persons, groups, places = [], [], []
    for location in find_files(source):
        file, row = TableFile(location), 0
        schema = file.schema()
        _check_columns(str(location), schema, column)
        for batch in file.batches(schema):
            names, values = (_names(batch.column(each), str(location), row, each) for each in (PERSON, column))
            if names.null_count:
                blank = pc.index(names.is_null(), True).as_py()
                raise ManifestError(f"{location}: row {row + 1 + blank}: column '{PERSON}' is blank")
            persons.append(names)
            groups.append(values)
            places.append((str(location), row, batch.num_rows))
            row += batch.num_rows
    if not sum(map(len, persons)):
        raise ManifestError(f"{source}: the table has no rows")
    return _distinct(pa.concat_arrays(persons), pa.concat_arrays(groups), places)


def _check_columns(name: str, schema: pa.Schema, column: str) -> None:
    require_columns(name, schema, (PERSON, column))
    for each in (PERSON, column):
        if pa.types.is_nested(schema.field(each).type):
            kind = type_text(schema.field(each).type)
            raise ManifestError(f"{name}: column '{each}' must hold single values, found {kind}")


def _names(cells: pa.Array, file: str, row: int, column: str) -> pa.Array:
    if is_text(cells.type):
        check_cells(cells, file, row, column)
    return cell_names(pa.chunked_array([cells])).combine_chunks()


def _distinct(
    persons: pa.Array, groups: pa.Array, places: list[tuple[str, int, int]]
) -> tuple[pa.StringArray, pa.StringArray]:
    """Each person once. places: file, first row and number of rows of each batch, for messages."""
    codes = persons.dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    values = groups.dictionary_encode().indices.fill_null(-1).to_numpy()
    clash = np.flatnonzero(values != values[first][codes])
    if len(clash):
        later, earlier = int(clash[0]), int(first[codes[clash[0]]])
        texts = [groups[each].as_py() for each in (earlier, later)]
        before, after = ("no group" if text is None else f"group {quoted(text)}" for text in texts)
        raise ManifestError(
            f"{_place(later, places)}: person {quoted(persons[later].as_py())} has {after} here and {before} in "
            f"{_place(earlier, places)}"
        )
    return persons.take(pa.array(first)), groups.take(pa.array(first))


def _place(index: int, places: list[tuple[str, int, int]]) -> str:
    """The file and row of an index into all rows."""
    for name, row, count in places:
        if index < count:
            return f"{name}: row {row + 1 + index}"
        index -= count
    raise IndexError(index)
