"""`batchverify evaluate`: figures and a report of what `score` wrote."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import together
from batchverify.cli.output import reporting, set_up
from batchverify.options import EvaluateOptions

_options = together(
    click.option(
        "-o", "--output", required=True, metavar="DIR", help="Folder for metrics.json and report.html."
    ),
    click.option(
        "--truth",
        metavar="MANIFEST",
        help="Manifest with the labels. Default: the scores' column true_label, the label of their manifest.",
    ),
    click.option(
        "--by",
        multiple=True,
        metavar="COLUMN",
        help="The figures for each value of this column, too, at the same threshold; may be repeated.",
    ),
    click.option(
        "--threshold",
        type=float,
        metavar="X",
        help="Judge the verdicts of SCORES at this one. Default: the run's own.",
    ),
    click.option(
        "--draws",
        default=EvaluateOptions.draws,
        show_default=True,
        metavar="N",
        help="Of the bootstrap behind the 95 % intervals, at least 40; 0: no intervals.",
    ),
    click.option("--seed", default=EvaluateOptions.seed, show_default=True, help="Of the bootstrap's draws."),
    click.option(
        "--examples",
        default=EvaluateOptions.examples,
        show_default=True,
        metavar="N",
        help="Pairs of each kind in the report's galleries.",
    ),
    click.option(
        "--image-root",
        metavar="DIR",
        help="Where relative image paths start. Default: what the run record says.",
    ),
    click.option(
        "--cache", metavar="URI", help="Embedding cache with the faces' boxes. Default: the run record's."
    ),
    click.option("--no-images", is_flag=True, help="No pictures in the report; paths stay."),
    click.option(
        "--export-worst",
        type=(int, str),
        metavar="N PATH",
        help="Write the N worst pairs for review, .csv or .parquet: a manifest that `train` takes.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Machine-readable summary on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No summary."),
    click.option("-v", "--verbose", is_flag=True, help="More about what happens."),
)


@click.command()
@click.argument("scores")
@click.argument("reference", required=False)
@_options
def evaluate(
    scores: str, reference: str | None, output: str, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Measure SCORES, a Parquet file or folder that `score` wrote, and write a report that opens offline.

    With REFERENCE, the scores of another run: what differs between the two, the pairs that flipped, and how
    far the scores have drifted. The truth may be missing; then distributions and drift are shown.
    """
    set_up(verbose)
    from batchverify.evaluation.evaluate import evaluate as run

    with reporting(as_json, quiet) as report:
        report(run(scores, output, reference, EvaluateOptions(**options)))
