"""The figures as tables for papers and spreadsheets: CSV and LaTeX."""

from __future__ import annotations

import csv
import io

from batchverify.evaluation.document import Document
from batchverify.evaluation.figures import NAMES, rate_name

Row = tuple[str, float, float | None, float | None]
HEADER = ("figure", "value", "low", "high")


def table_rows(document: Document) -> list[Row]:
    """Name, value and both ends of the 95 % interval of every figure that the pairs support."""
    named = {NAMES[name]: (name, value) for name, value in document["metrics"].items()}
    named |= {
        f"true accept rate at false accept rate {rate['far']:g}": (rate_name(rate["far"]), rate["tar"])
        for rate in document["rates"]
    }
    rows: list[Row] = []
    for title, (name, value) in named.items():
        if value is not None:
            low, high = document["intervals"].get(name) or (None, None)
            rows.append((title, value, low, high))
    return rows


def as_csv(document: Document) -> str:
    """All digits, for programs; an absent interval is blank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(table_rows(document))
    return text.getvalue()


def as_latex(document: Document) -> str:
    """A `tabular` with four decimals; it needs no package."""
    lines = [r"\begin{tabular}{lrr}", r"\hline", r"figure & value & 95\,\% interval \\", r"\hline"]
    for title, value, low, high in table_rows(document):
        span = f"{low:.4f} to {high:.4f}" if low is not None else ""
        lines.append(rf"{title} & {value:.4f} & {span} \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])
