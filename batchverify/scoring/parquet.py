"""Parquet files of scores: their schema, their run record, and a writer of whole files."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.documents import MOST_RECORD, read_document
from batchverify.engine.fused_table import FusedTable, Table
from batchverify.errors import BatchverifyError, ManifestError, UsageError, first_line
from batchverify.heads.review_band import VERDICT, VERDICTS, ReviewBand
from batchverify.manifest.columns import BACKBONES, SCORE_SCHEMA, is_text, quoted, type_text
from batchverify.manifest.manifest import Block
from batchverify.scoring.details import DETAIL_FIELDS, detail_columns
from batchverify.storage.location import Location, publish
from batchverify.storage.object_store import retry
from batchverify.storage.temporary import drop, hold, temporary_name

RECORD_KEY = "batchverify"
_FITTING = (
    *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_date32),
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary),
    pa.types.is_null,
)
# Written last into a folder of parts, when all parts are complete.
SUCCESS = "_SUCCESS"
# Types of the entries of a run record that are read back; each may be absent or null.
RECORD_TYPES: dict[str, type] = {
    **dict.fromkeys(("job", "options", "embedding", "failures", "backbones", "review", "prior"), dict),
    **dict.fromkeys(("version", "run_id", "token", "compute_path", "image_root", "cache"), str),
    **dict.fromkeys(("rows", "unique_images", "scored", "failed", "failed_rows", "part_rows"), int),
    "manifest": list,
}
PART = re.compile(r"^part-(\d{5,})\.parquet$")


def output_schema(
    carried: pa.Schema, *, fused: bool = False, details: bool = False, review: bool = False
) -> pa.Schema:
    """The manifest's columns, the scores and the details; `ManifestError` if they have a name in common.

    fused: with the column of the backbones that made a score. review: with the column of three verdicts.
    """
    scores = [*SCORE_SCHEMA, pa.field(BACKBONES, pa.string())] if fused else [*SCORE_SCHEMA]
    details_fields = DETAIL_FIELDS if details else []
    more = [*([pa.field(VERDICT, pa.string())] if review else []), *details_fields]
    for field in (*scores, *more):
        if field.name in carried.names:
            option = "--details" if field in details_fields else "--review"
            by = f" of {option}" if field in more else ""
            raise ManifestError(
                f"the manifest's column '{field.name}' has the name of an output column{by}; rename it"
            )
    return pa.schema([*carried, *scores, *more])


def check_columns(file: str, carried: pa.Schema, blocks: Callable[[], Iterable[Block]]) -> None:
    """Refuse columns that Parquet cannot hold, with `ManifestError`. file: the manifest's name.

    Common types always fit. Columns of other types (`blocks` gives their rows) are written and read back once, in
    memory, block by block: some types fit only with some values.
    """
    doubtful = [field for field in carried if not _always_fits(field.type)]
    for block in blocks() if doubtful else ():
        for field in doubtful:
            _try_column(file, pa.table({field.name: block.carried.column(field.name)}))


def _always_fits(kind: pa.DataType) -> bool:
    """Whether a column of this type can be written to Parquet whatever its values are."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _always_fits(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_always_fits(field.type) for field in kind)
    if pa.types.is_dictionary(kind):
        return pa.types.is_string(kind.value_type)
    return any(test(kind) for test in _FITTING)


def _try_column(file: str, column: pa.Table) -> None:
    try:
        sink = pa.BufferOutputStream()
        pq.write_table(column, sink)
        read = pq.ParquetFile(pa.BufferReader(sink.getvalue())).read()
        # Some releases of pyarrow let times wrap around.
        if pa.types.is_timestamp(column.schema.field(0).type) and not read.cast(column.schema).equals(column):
            raise pa.ArrowInvalid("a time is out of range")
    except (OSError, pa.ArrowException) as exc:
        field, why = column.schema.field(0), first_line(exc)
        raise ManifestError(
            f"{file}: column {quoted(field.name)} ({type_text(field.type)}) does not fit into Parquet: {why}; remove "
            "or convert it"
        ) from exc


def result_table(
    block: Block,
    embeddings: Table,
    scores: tuple[np.ndarray, np.ndarray],
    threshold: float,
    names: Sequence[str] = (),
    band: ReviewBand | None = None,
) -> pa.Table:
    """The output rows of a block, with details if the table has them.

    scores: (M,) probability and similarity of its M usable pairs, in order. names: of fused backbones.
    band: gives the column of three verdicts.
    """
    unusable = ~embeddings.usable(block.a, block.b)
    probability, similarity = np.zeros(len(unusable), np.float32), np.zeros(len(unusable), np.float32)
    probability[~unusable], similarity[~unusable] = scores
    # Compared in the column's precision, so that readers who repeat the comparison get the same labels.
    label = (probability >= np.float32(threshold)).astype(np.int8)
    # A pair that one of several backbones has scored has no error.
    error_a, error_b = (
        pc.if_else(pa.array(unusable), embeddings.reasons(side), pa.scalar(None, pa.string()))
        for side in (block.a, block.b)
    )
    columns = [
        pa.array(probability, mask=unusable),
        pa.array(label, mask=unusable),
        pa.array(similarity, mask=unusable),
        pc.coalesce(error_a, error_b, pa.scalar("ok")),
        error_a,
        error_b,
    ]
    fused = isinstance(embeddings, FusedTable)
    if isinstance(embeddings, FusedTable):
        columns.append(embeddings.makers(block.a, block.b, names))
    if band is not None:
        verdicts = pa.array(band.verdicts(probability), mask=unusable)
        columns.append(pa.array(VERDICTS).take(verdicts))
    details = embeddings.details
    if details is not None:
        for side in (block.a, block.b):
            columns += detail_columns(details[side], embeddings.reasons(side))
    schema = output_schema(block.carried.schema, fused=fused, details=details is not None, review=band is not None)
    return pa.Table.from_arrays([*block.carried.columns, *columns], schema=schema)


def run_record(footer: pq.FileMetaData) -> dict[str, Any]:
    """The run record in a Parquet file's footer; empty if there is none or it is damaged."""
    return parse_record((footer.metadata or {}).get(RECORD_KEY.encode(), b""))


def parse_record(text: bytes) -> dict[str, Any]:
    """The run record in the text of a footer or of `_SUCCESS`; empty if the text holds none."""
    try:
        record = read_document(text, MOST_RECORD)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and _is_typed(record) else {}


def _is_typed(record: Mapping[str, Any]) -> bool:
    """Whether the entries that are read back have the types that `Job.record` and the parts give them."""
    typed = all(isinstance(record.get(name), (kind, type(None))) for name, kind in RECORD_TYPES.items())
    return typed and _is_prior(record.get("prior"))


def _is_prior(prior: Mapping[str, Any] | None) -> bool:
    """Whether this is what `--prior` writes, or nothing."""
    if prior is None:
        return True
    share, source = prior.get("share"), prior.get("source")
    known = isinstance(share, float) and 0 < share < 1 and source in ("given", "estimated")
    return known and (source == "given" or {"interval", "pairs", "drift"} <= prior.keys())


def record_text(record: Mapping[str, Any]) -> str:
    """A run record as text, for footers and `_SUCCESS`."""
    return json.dumps(record, sort_keys=True)


class FileSink:
    """Writes one Parquet file that appears whole or not at all. For object stores it goes through a local file.

    staging: folder of the same file system for the temporary file, the target's by default. short_lived: the
    file will be read once and deleted. It takes less than half of the time and is half as large again. Raises
    `BatchverifyError`, at once if nothing can be written.
    """

    def __init__(
        self,
        target: Location,
        schema: pa.Schema,
        staging: Location | None = None,
        *,
        short_lived: bool = False,
    ) -> None:
        self._target = target
        folder, name = staging or target.parent, temporary_name(target.name)
        self._temporary = Path(folder.path if target.is_local else gettempdir()) / name
        self._upload = None if target.is_local else folder.join(name)
        self._writer: pq.ParquetWriter | None = None
        self._short_lived = short_lived
        try:
            if self._upload is not None:
                # A store that refuses writes is found out now and not after the work.
                self._upload.write_bytes(b"")
                hold(self._temporary)
            self._writer = pq.ParquetWriter(
                str(self._temporary),
                schema,
                filesystem=Location(str(self._temporary)).filesystem,
                **_packing(schema, short_lived),
            )
        except (OSError, pa.ArrowException) as exc:
            self.abandon()
            raise BatchverifyError(f"{target}: could not be written: {exc}") from exc

    def write(self, table: pa.Table) -> None:
        """Write the next rows as one row group."""
        with writing(self._target):
            self._open_writer().write_table(table)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the file, sync it to disk and give it its name."""
        with writing(self._target):
            writer = self._open_writer()
            writer.add_key_value_metadata({RECORD_KEY: record_text(record)})
            writer.close()
            self._publish()
        self.abandon()

    def _publish(self) -> None:
        if self._upload is None:
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            publish(self._temporary, Path(self._target.path))
            return
        try:
            upload = self._upload
            retry(lambda: self._send(upload))
        except OSError as exc:
            if self._short_lived:
                raise
            # The work is kept if the upload fails, for instance because a store refuses to move more than 5 GB.
            kept = self._temporary.rename(self._temporary.with_name(f"{uuid.uuid4().hex[:8]}-{self._target.name}"))
            raise OSError(f"{exc}; the finished file is kept at {kept}") from exc

    def abandon(self) -> None:
        """Close and remove the temporary files."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None
        with suppress(OSError):
            drop(self._temporary)
        if self._upload is not None:
            with suppress(OSError):
                self._upload.filesystem.delete_file(self._upload.path)
            self._upload = None

    def _open_writer(self) -> pq.ParquetWriter:
        if self._writer is None:
            raise BatchverifyError(f"{self._target}: written after it was finished or abandoned")
        return self._writer

    def _send(self, upload: Location) -> None:
        """Upload under a temporary key, then move: an interrupted upload may leave a cut object (arrow#40502)."""
        with self._temporary.open("rb") as file, upload.filesystem.open_output_stream(upload.path) as out:
            while chunk := file.read(16 << 20):
                out.write(chunk)
        sent = upload.filesystem.get_file_info(upload.path).size
        if sent != self._temporary.stat().st_size:
            raise OSError(f"{sent:,} bytes arrived of {self._temporary.stat().st_size:,}")
        upload.filesystem.move(upload.path, self._target.path)


def part_files(folder: Location) -> list[Location]:
    """The part files of an output folder, in order; none if the folder is absent."""
    return [file for file, _ in folder.files() if PART.match(file.name)]


def _packing(schema: pa.Schema, short_lived: bool) -> dict[str, Any]:
    if short_lived:
        return {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
    # Numbers seldom repeat: dictionaries for them took a third of the time and made files a quarter larger.
    texts = [field.name for field in schema if is_text(field.type) or pa.types.is_dictionary(field.type)]
    return {"compression": "zstd", "use_dictionary": texts}


@contextmanager
def writing(target: Location) -> Iterator[None]:
    """Raise errors of writing as `BatchverifyError`."""
    try:
        yield
    except (OSError, UsageError, pa.ArrowException) as exc:
        raise BatchverifyError(f"{target}: could not be written: {exc}") from exc
