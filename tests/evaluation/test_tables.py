"""Tables of the figures: every digit in CSV, one line a figure in LaTeX."""

import csv
import io
from typing import Any

from batchverify.evaluation.tables import as_csv, as_latex

DOCUMENT: Any = {
    "metrics": {"auc": 0.987654321, "f1": None, "d_prime": 3.25},
    "intervals": {"auc": (0.97, 0.99), "tar@1e-3": (0.5, 0.75)},
    "rates": [{"far": 1e-3, "tar": 0.625}, {"far": 1e-4, "tar": None}],
}


def test_csv_holds_every_known_figure_in_full():
    rows = list(csv.reader(io.StringIO(as_csv(DOCUMENT))))
    assert rows == [
        ["figure", "value", "low", "high"],
        ["ROC AUC", "0.987654321", "0.97", "0.99"],
        ["d'", "3.25", "", ""],
        ["true accept rate at false accept rate 0.001", "0.625", "0.5", "0.75"],
    ]


def test_latex_has_a_row_for_each():
    lines = as_latex(DOCUMENT).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[-1] == r"\end{tabular}"
    assert r"ROC AUC & 0.9877 & 0.9700 to 0.9900 \\" in lines
    assert r"D' & 3.2500 &  \\" not in lines and r"d' & 3.2500 &  \\" in lines
