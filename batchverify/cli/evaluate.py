"""`batchverify evaluate`: measure what `score` wrote and write a report."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import follow_symlinks_option, json_option, option, seed_option, together
from batchverify.cli.output import reporting, set_up
from batchverify.options import EvaluateOptions

_options = together(
    click.option(
        "-o", "--output", required=True, metavar="DIR", help="Folder for metrics.json and report.html."
    ),
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
    option("--threshold", "Judge SCORES at this threshold. Default: the threshold of the run.", "X"),
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
    click.option(
        "--image-root",
        metavar="DIR",
        help="Folder or URI that relative image paths start from. Default: from the run record.",
    ),
    follow_symlinks_option,
    click.option(
        "--cache",
        metavar="URI",
        help="Embedding cache with the boxes of the faces. Default: from the run record.",
    ),
    click.option("--no-images", is_flag=True, help="Show paths instead of images in the report."),
    click.option(
        "--export-worst",
        type=(int, str),
        metavar="N PATH",
        help="Write the N worst pairs to a .csv or .parquet file for review: a manifest that `train` reads.",
    ),
    click.option("--tables", is_flag=True, help="Also write the figures as figures.csv and figures.tex."),
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
