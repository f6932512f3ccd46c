"""`batchverify calibrate`: fit a head's probabilities and thresholds to pairs of one's own."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import calibration_option, learning_options, output_option, together
from batchverify.cli.output import reporting, set_up
from batchverify.options import CalibrateOptions


@click.command()
@click.argument("head")
@click.option(
    "--labelled",
    required=True,
    metavar="PAIRS",
    help="Manifest with a label in every row, or an output of `score` by HEAD with true labels.",
)
@output_option("NEW", "Head file to write; its name must end in .safetensors.")
@click.option(
    "--apart-from",
    multiple=True,
    metavar="MANIFEST",
    help="Refuse PAIRS that share people or images with this manifest. Repeatable. The pairs that HEAD was trained "
    "on are compared anyway if the record beside it names them.",
)
@together(calibration_option, learning_options)
def calibrate(head: str, labelled: str, output: str, as_json: bool, **options: Any) -> None:
    """Fit a head's calibration, thresholds and bounds to labelled pairs.

    HEAD is a head file, or the word shipped for the head that is shipped for these settings. Its weights stay as
    they are. PAIRS should be drawn as those that will be scored, of people whom HEAD was not trained on.
    """
    set_up(options["verbose"])
    from batchverify.training.calibrate import calibrate as run

    with reporting(as_json, options["quiet"]) as report:
        report(run(head, labelled, output, CalibrateOptions(**options)))
