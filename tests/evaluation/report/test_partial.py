"""Reports of partial runs in a real browser: no errors, and every plot that has data."""

import pyarrow as pa
import pytest
from pages import Opened
from score_tables import draw_columns, write_scores

import batchverify

BARS = {"probability", "similarity"}


def labels(kind):
    return pa.array([kind] * 300, pa.int8())


PARTIAL = {
    "no truth": ({"true_label": None}, BARS),
    "same pairs alone": ({"true_label": labels(0)}, BARS | {"calibration"}),
    "different pairs alone": ({"true_label": labels(1)}, BARS | {"calibration"}),
    "all failed": ({"failed": 2.0}, set()),
    "no similarity": ({"similarity": None}, {"probability", "roc", "det", "calibration"}),
}


@pytest.mark.parametrize("case", PARTIAL)
@pytest.mark.parametrize("beside", [None, "the same pairs", "other pairs"])
def test_a_partial_report_throws_nothing_and_draws_what_it_can(browser, tmp_path, case, beside):
    changes, plots = PARTIAL[case]
    new = write_scores(tmp_path / "new.parquet", draw_columns(300, **changes))
    other = beside == "other pairs"
    # Fewer rows, so that no row of one is taken for one of the other.
    if other:
        changes = {name: each[:200] if name == "true_label" and each else each for name, each in changes.items()}
    old = write_scores(tmp_path / "old.parquet", draw_columns(200 if other else 300, other, **changes))
    batchverify.evaluate(new, tmp_path / "out", old if beside else None, by="camera", draws=0)
    if beside and case != "all failed":
        plots = plots | {"drift"} | ({"scatter"} if beside == "the same pairs" else set())
    with Opened(browser, tmp_path / "out" / "report.html") as opened:
        assert opened.said == []
        assert opened.drawn() == plots
        assert opened.page.locator("#threshold").count() == (case != "all failed")
        before = opened.page.locator("#nearest .before").count()
        assert (before > 0) == (beside == "the same pairs" and case != "all failed")
