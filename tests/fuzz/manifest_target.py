"""The manifest reader: text and Parquet, plain and compressed."""

from __future__ import annotations

import gzip
import io

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from target import Target, require

from batchverify.errors import UsageError
from batchverify.manifest.manifest import Manifest
from batchverify.scoring.parquet import check_columns, output_schema


class ManifestTarget(Target):
    """A manifest, read twice as a run does. The first byte chooses the file's kind."""

    KINDS = (".csv", ".tsv", ".parquet", ".csv.gz", ".csv.zst")

    def seeds(self) -> list[bytes]:
        """Tables of each kind, plain and with odd columns."""
        names = {"image_a": ["a.jpg", 'b "c".jpg', "sub/é.jpg"], "image_b": ["b.jpg", "", "s3://b/k"]}
        tables = [pa.table(names), pa.table({**names, "label": [0, 1, 0], "note": [None, "x,y", "a\nb"]})]
        tables.append(pa.table({**names, "list": [[1], None, [2, 3]], "when": pa.array([0, 1, 2], pa.date32())}))
        return [
            bytes([number]) + self._encoded(table, kind)
            for number, kind in enumerate(self.KINDS)
            for table in tables[: 3 if kind == ".parquet" else 2]
        ]

    def _encoded(self, table: pa.Table, kind: str) -> bytes:
        stream = io.BytesIO()
        if kind == ".parquet":
            pq.write_table(table, stream)
            return stream.getvalue()
        options = pacsv.WriteOptions(delimiter="\t" if kind == ".tsv" else ",")
        pacsv.write_csv(table, stream, options)
        text = stream.getvalue()
        if kind.endswith(".gz"):
            return gzip.compress(text, mtime=0)
        return bytes(pa.compress(text, "zstd", asbytes=True)) if kind.endswith(".zst") else text

    def run(self, data: bytes) -> None:
        """Open, scan, stream, and look whether the columns fit into the output."""
        file = self.folder / f"pairs{self.KINDS[data[0] % len(self.KINDS)] if data else '.csv'}"
        file.write_bytes(data[1:])
        try:
            manifest = Manifest.open(file)
            scan = manifest.scan()
            rows = sum(len(block.a) for block in manifest.blocks(scan))
            output_schema(scan.carried)
            check_columns(str(file), scan.carried, lambda: manifest.blocks(scan))
        except UsageError as exc:
            require(str(exc).startswith(("pairs", str(file), "the manifest", "column")), f"names no file: {exc}")
            return
        require(rows == scan.rows > 0, f"{rows} of {scan.rows} rows")


TARGET = ManifestTarget
