"""The columns of a manifest: allowed names and types, labels, and the types of CSV columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import ManifestError, first_line, shortened

TRUE_LABEL = "true_label"
LABEL = "label"
# A column of files from `evaluate --export-worst`. Such files may have a column `probability`, that of the run.
PREDICTED_LABEL = "predicted_label"
# The columns that scoring appends to the manifest's.
SCORE_SCHEMA = pa.schema(
    {
        "probability": pa.float32(),
        "label": pa.int8(),
        "similarity": pa.float32(),
        "status": pa.string(),
        "error_a": pa.string(),
        "error_b": pa.string(),
    }
)
# What a run with several backbones appends as well: those that made the score.
BACKBONES = "backbones"
# The columns that `--details` appends to these for each side, as NAME_a and NAME_b.
DETAIL_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("face_x0", "face_y0", "face_x1", "face_y1", "face_size"), pa.float32()),
        "landmarks": pa.list_(pa.float32()),
        "confidence": pa.float32(),
        "faces": pa.int16(),
        "rotation": pa.int16(),
        "sharpness": pa.float32(),
    }
)
# Spellings of labels in text, in lower case and without blanks around them. Truth values: of Python, of polars,
# DuckDB, Spark and Arrow, of Excel and R, and of PostgreSQL. Missing values: of pandas, R, SQL and spreadsheets.
_TRUTHS = {"false": 0, "true": 1, "f": 0, "t": 1}
_MISSING = {"", "none", "nan", "na", "null", "<na>", "n/a", "#n/a", "\\n"}
_NUMBER = re.compile(r"([01])(?:\.0*)?(?:e[+-]?0+)?")
_BAD = -1
# Names, and characters of a value, in a message.
_LISTED, _SHOWN = 20, 80
# Canonical numbers only: cells such as 007, 1.50 or +3 would change on the way there and back.
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_DECIMAL = r"^-?(0|[1-9][0-9]{0,16})\.[0-9]{1,20}$"
_NUMBER_TYPES = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)


def quoted(value: Any) -> str:
    """A name or value for a message: in quotes, on one line, not too long."""
    return shortened(repr(value), _SHOWN)


def type_text(kind: pa.DataType) -> str:
    """A type for a message. Those of structs hold names."""
    return shortened(" ".join(str(kind).split()), _SHOWN)


def check_names(file: str, names: Sequence[str], a: str, b: str) -> None:
    """Refuse a file that lacks an image column (a, b), repeats a name or has a name of an output column.

    A label whose name has blanks around it, as after `image_a, image_b, label`, is refused, not taken for none.
    """
    for name, option in ((a, "--column-a"), (b, "--column-b")):
        if name not in names:
            raise ManifestError(f"{file}: no column {quoted(name)} ({option}); the file has {_listed(names)}")
        if name == LABEL:
            raise ManifestError(f"{file}: column '{LABEL}' ({option}) holds the truth, not paths")
    if a == b:
        raise ManifestError(f"{file}: column '{a}' is given for both images")
    # Looked up once: there may be tens of thousands of names.
    has_label = LABEL in names
    for name, count in Counter(names).items():
        if count > 1 and not name:
            raise ManifestError(
                f"{file}: {count} columns have no name; name or remove them (in a CSV, the commas at the ends of "
                "lines)"
            )
        if count > 1:
            raise ManifestError(f"{file}: column {quoted(name)} appears {count} times")
        is_review = name == "probability" and PREDICTED_LABEL in names
        if name in {TRUE_LABEL, *SCORE_SCHEMA.names} - {LABEL} and not is_review:
            raise ManifestError(
                f"{file}: column {quoted(name)} is a name of an output column; rename it in the manifest"
            )
        if not has_label and name.strip() == LABEL:
            raise ManifestError(
                f"{file}: column {quoted(name)} has blanks around its name; name it '{LABEL}' if it is the truth, "
                "else otherwise"
            )


def _listed(names: Sequence[str]) -> str:
    """Names for a message; those whose blanks or signs would be missed are quoted."""
    shown = [name if re.fullmatch(r"\S(.*\S)?", name) and name.isprintable() else repr(name) for name in names]
    more = [f"and {len(names) - _LISTED:,} more"] if len(names) > _LISTED else []
    return ", ".join([*(name[:_SHOWN] for name in shown[:_LISTED]), *more]) or "no columns"


def check_same_names(file: str, names: Sequence[str], first: str, expected: Sequence[str]) -> None:
    """Refuse a file whose columns are not those of the first one; their order may differ."""
    mine, others = set(names), set(expected)
    missing = [f"{quoted(name)} is missing" for name in expected if name not in mine]
    new = [f"{quoted(name)} is new" for name in names if name not in others]
    if missing or new:
        differences = ", ".join((missing + new)[:_LISTED])
        raise ManifestError(f"{file}: columns differ from those of {first}: {differences}")


def common_type(name: str, kinds: Mapping[str, pa.DataType], *, paths: bool) -> pa.DataType:
    """The type of a column in all files; a column without values takes the type of the others. kinds: by file.

    Raises `ManifestError` for a column of paths that holds no strings, and for types that differ.
    """
    first_files: dict[pa.DataType, str] = {}
    for file, kind in kinds.items():
        if paths and not is_text(kind):
            raise ManifestError(f"{file}: column {quoted(name)} must hold paths (strings), found {type_text(kind)}")
        if not pa.types.is_null(kind):
            first_files.setdefault(kind, file)
    if len(first_files) > 1 and paths:
        return pa.string()
    if len(first_files) > 1:
        (kind, file), (other, other_file) = list(first_files.items())[:2]
        raise ManifestError(
            f"{other_file}: column {quoted(name)} holds {type_text(other)}, in {file} it holds {type_text(kind)}"
        )
    kind = next(iter(first_files), pa.null())
    # Before version 19, pyarrow cannot write string views to Parquet.
    return pa.string() if pa.types.is_string_view(kind) else kind


def check_label_type(file: str, kind: pa.DataType, name: str = LABEL) -> None:
    """Refuse a label column that holds neither numbers nor strings."""
    value = _value_type(kind)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    if not (is_text(kind) or any(test(value) for test in numbers)):
        raise ManifestError(f"{file}: column {quoted(name)} must hold 0 or 1, found {type_text(kind)}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings of any representation, or only nulls."""
    kind = _value_type(kind)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def read_paths(cells: pa.Array, file: str, row: int, name: str) -> pa.Array:
    """Paths as strings. row: how many rows of the file come before these.

    Raises what `check_cells` raises: only readers of CSV look whether texts are UTF-8.
    """
    if pa.types.is_string(cells.type) and pc.all(pc.string_is_ascii(cells)).as_py():
        return cells
    cells = cells.cast(pa.string())
    check_cells(cells, file, row, name)
    return cells


def check_cells(cells: pa.Array, file: str, row: int, name: str) -> None:
    """Refuse strings that are not UTF-8 and damaged arrays, with `ManifestError`. row: as in `read_paths`."""
    try:
        cells.validate(full=True)
    except pa.ArrowInvalid as exc:
        index = re.search(r"Invalid UTF8 sequence at string index (\d+)", str(exc))
        if not index:
            raise ManifestError(f"{file}: column {quoted(name)} is damaged: {first_line(exc)}") from exc
        plain = is_text(cells.type) and not pa.types.is_dictionary(cells.type)
        where = f"row {row + 1 + int(index.group(1))}: " if plain else ""
        raise ManifestError(f"{file}: {where}column {quoted(name)}: not UTF-8") from exc


def cell_names(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names as strings, with null for blank and NaN; `1.0` and `1` are the same name."""
    texts = cells.cast(pa.string())
    if pa.types.is_floating(cells.type):
        texts = pc.replace_substring_regex(texts, r"\.0$", "")
        texts = pc.if_else(pc.is_nan(cells), pa.scalar(None, pa.string()), texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def read_numbers(cells: pa.ChunkedArray, file: str, name: str) -> np.ndarray:
    """A column of numbers, or of texts that are numbers, as (N,) float64; blank cells are NaN.

    Raises `ManifestError` with the row of a text that is no number, and for other types.
    """
    if is_text(cells.type):
        texts = pc.utf8_trim_whitespace(cells.cast(pa.string()))
        cells = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    elif not any(is_number(cells.type) for is_number in _NUMBER_TYPES):
        raise ManifestError(f"{file}: column '{name}' must hold numbers, found {type_text(cells.type)}")
    try:
        numbers = cells.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid as exc:
        row, text = next((row, text) for row, text in enumerate(cells.to_pylist()) if not _is_number(text))
        raise ManifestError(f"{file}: row {row + 1}: column '{name}' must hold numbers, got {quoted(text)}") from exc
    return np.concatenate([np.zeros(0), *(chunk.to_numpy(zero_copy_only=False) for chunk in numbers.chunks)])


def _is_number(text: str | None) -> bool:
    """Whether Arrow reads a text as a number."""
    try:
        pa.array([text], pa.string()).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def read_labels(cells: pa.Array, file: str, row: int) -> pa.Array:
    """Labels as int8: 0, 1, or null for blank. row: how many rows of the file come before these.

    Raises `ManifestError` that names the first row with anything else.
    """
    if pa.types.is_null(cells.type):
        return cells.cast(pa.int8())
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if is_text(cells.type):
        cells = cells.cast(pa.string())
        check_cells(cells, file, row, LABEL)
    encoded = cells.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    labels = [_label(value) for value in values]
    if _BAD in labels:
        bad = labels.index(_BAD)
        offset = pc.index(encoded.indices, pa.scalar(bad, encoded.indices.type)).as_py()
        raise ManifestError(f"{file}: row {row + 1 + offset}: label must be 0 or 1, got {quoted(values[bad])}")
    return pa.array(labels, pa.int8()).take(encoded.indices)


def _label(value: Any) -> int | None:
    if isinstance(value, str):
        text = value.strip().lower()
        number = _NUMBER.fullmatch(text)
        return int(number.group(1)) if number else None if text in _MISSING else _TRUTHS.get(text, _BAD)
    if value != value:  # NaN, as pandas writes a blank among numbers
        return None
    return int(value) if value in (0, 1) else _BAD


class LosslessTypes:
    """Finds, batch by batch, which string columns of a CSV can become numbers without loss.

    A column becomes int64 or float64 if every non-empty cell is a canonical number; `007` and `1.50` stay strings.
    """

    def __init__(self, names: list[str]) -> None:
        self._candidates = {name: [pa.int64(), pa.float64()] for name in names}
        self._filled: set[str] = set()

    def see(self, batch: pa.RecordBatch) -> None:
        """Rule out types that one more batch of string columns does not allow."""
        for name, kinds in self._candidates.items():
            if kinds:
                cells = batch.column(name)
                cells = cells.filter(pc.not_equal(cells, ""))
                if len(cells):
                    self._filled.add(name)
                    kinds[:] = [kind for kind in kinds if _is_lossless(cells, kind)]

    def types(self) -> dict[str, pa.DataType]:
        """The type of each column."""
        return {
            name: kinds[0] if kinds and name in self._filled else pa.string()
            for name, kinds in self._candidates.items()
        }


def _is_lossless(cells: pa.Array, kind: pa.DataType) -> bool:
    if pa.types.is_integer(kind):
        return _all_match(cells, _INTEGER)
    if not _all_match(cells, _DECIMAL):
        return False
    # Arrow prints whole floats without ".0".
    printed = cells.cast(kind).cast(pa.string())
    return bool(pc.replace_substring_regex(cells, r"\.0$", "").equals(printed))


def _all_match(cells: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(cells, pattern)).as_py())


def convert(cells: pa.Array, kind: pa.DataType) -> pa.Array:
    """String cells as the type that `LosslessTypes` found; empty cells of number columns become null."""
    if pa.types.is_string(kind):
        return cells
    return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells).cast(kind)
