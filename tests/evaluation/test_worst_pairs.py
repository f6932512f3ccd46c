"""The files for review: never written over an input."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.errors import UsageError


@pytest.mark.parametrize("name", ["new.parquet", "old.parquet", "truth.csv", "run/worst.csv"])
def test_an_export_over_an_input_is_refused(tmp_path, name):
    columns = draw_columns(60)
    new, old = (write_scores(tmp_path / f"{each}.parquet", columns) for each in ("new", "old"))
    (tmp_path / "run").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "run" / "part-00000.parquet")
    (tmp_path / "run" / "_SUCCESS").write_text('{"threshold": 0.5}')
    truth = tmp_path / "truth.csv"
    rows = zip(columns["image_a"], columns["image_b"], columns["true_label"].to_pylist(), strict=True)
    truth.write_text("image_a,image_b,label\n" + "".join(f"{a},{b},{label}\n" for a, b, label in rows))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    reference = tmp_path / "run" if name.startswith("run") else old
    with pytest.raises(UsageError, match="--export-worst would write into the input "):
        batchverify.evaluate(
            new,
            reference=reference,
            truth=str(truth) if name == "truth.csv" else None,
            export_worst=(5, str(tmp_path / name)),
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
