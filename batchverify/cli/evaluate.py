"""`batchverify evaluate`: measure what `score` wrote and write a report."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import (
    confidence_option,
    follow_symlinks_option,
    json_option,
    option,
    output_option,
    seed_option,
    together,
)
from batchverify.cli.output import reporting, set_up
from batchverify.options import EvaluateOptions

_options = together(
    output_option("DIR", "Folder for metrics.json and report.html."),
    option(
        "--truth",
        "Manifest with the labels. Default: column true_label of SCORES, which holds the labels of its manifest.",
        "MANIFEST",
    ),
    option(
        "--by",
        "Also measure the pairs of each value of this column, at the same threshold. Repeatable.",
        "COLUMN",
        multiple=True,
    ),
    option("--group-a", "Column with the group of the first image's person: error rates by group.", "COLUMN"),
    option("--group-b", "Column with the group of the second image's person.", "COLUMN"),
    option("--people", "Table with a column person, one row for each person, for --group.", "TABLE"),
    option("--group", "Column of the table of --people with the group of each person.", "COLUMN"),
    option(
        "--quality",
        "Error rates after discarding the pairs of lowest value in this column, or of COLUMN_a and COLUMN_b the "
        "lower. With - before it the highest are discarded. Repeatable.",
        "COLUMN",
        multiple=True,
    ),
    option(
        "--wanted-fnmr",
        "How many pairs must be discarded for this false non-match rate, besides those of the table. Repeatable.",
        "X",
        multiple=True,
    ),
    option("--threshold", "Judge SCORES at this threshold. Default: the threshold of the run.", "X"),
    option("--at-far", "Judge SCORES at the threshold of their head for this false accept rate.", "X"),
    confidence_option,
    option("--head", "Head of --at-far. Default: from the run record.", "PATH"),
    option(
        "--score",
        "SCORES or REFERENCE is a CSV or Parquet file of another system with its scores in this column.",
        "COLUMN",
    ),
    option(
        "--higher-is",
        "What a high score of --score means: same (a similarity) or different (a distance).",
        "same|different",
    ),
    option("--draws", "Bootstrap draws behind the 95 % intervals, at least 40; 0: no intervals.", "N"),
    seed_option,
    option("--examples", "Pairs of each kind in the report's galleries.", "N"),
    option(
        "--image-root", "Folder or URI that relative image paths start from. Default: from the run record.", "DIR"
    ),
    follow_symlinks_option,
    option("--cache", "Embedding cache with the boxes of the faces. Default: from the run record.", "URI"),
    click.option("--no-images", is_flag=True, help="Show paths instead of images in the report."),
    click.option(
        "--export-worst",
        type=(int, str),
        metavar="N PATH",
        help="Write the N worst pairs to a .csv or .parquet file for review: a manifest that `train` reads.",
    ),
    click.option(
        "--suspects",
        type=(int, str),
        metavar="N PATH",
        help="Write the N labels most likely wrong, with reasons, to a new .csv or .parquet file for review.",
    ),
    click.option("--tables", is_flag=True, help="Also write the figures as figures.csv and figures.tex."),
    option(
        "--plots", "Also write each plot as plot-NAME.svg and .png. Needs Chromium, Chrome or Edge.", is_flag=True
    ),
    click.option("--pdf", is_flag=True, help="Also write report.pdf. Needs Chromium, Chrome or Edge."),
    json_option,
    click.option("-q", "--quiet", is_flag=True, help="Show no summary."),
    click.option("-v", "--verbose", is_flag=True, help="Log more."),
)


@click.command()
@click.argument("scores")
@click.argument("reference", required=False)
@_options
def evaluate(
    scores: str, reference: str | None, output: str, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Measure what `score` wrote, and write a report.

    SCORES is a Parquet file or a folder of part files; the report opens offline. With REFERENCE, the scores
    of another run, it also shows what differs between the runs, which pairs flipped and how far the scores
    have drifted. Without labels it shows distributions and drift alone.
    """
    set_up(verbose)
    from batchverify.evaluation.evaluate import evaluate as run

    with reporting(as_json, quiet) as report:
        report(run(scores, output, reference, EvaluateOptions(**options)))
