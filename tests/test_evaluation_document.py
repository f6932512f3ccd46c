"""metrics.json has the keys that docs/metrics.md describes, no more and no fewer."""

import re

from repository import REPOSITORY
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.measured import NAMES


def described() -> list[set[str]]:
    """The names in the first column of each table of the page."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    tables = re.split(r"\| --- \| --- \|\n", text)[1:]
    return [
        {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
        for table in (each.partition("\n\n")[0] for each in tables)
    ]


def test_every_key_and_figure_is_described(tmp_path):
    keys, figures = described()
    columns = draw_columns(120, fold=[each % 3 for each in range(120)])
    runs = [write_scores(tmp_path / f"{name}.parquet", columns) for name in ("new", "old")]
    found = batchverify.evaluate(runs[0], reference=runs[1], by="camera", draws=40).document
    assert set(found) == keys
    assert set(found["metrics"]) == set(NAMES) == figures
