"""`batchverify train`: fit a head to labelled pairs."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import learning_options, output_option, together, train_options
from batchverify.cli.output import reporting, set_up
from batchverify.options import TrainOptions


@click.command()
@click.argument("manifest", metavar="TRAIN")
@click.option("--dev", required=True, metavar="DEV", help="Manifest of pairs for calibration and early stopping.")
@output_option("HEAD", "Head file to write; its name must end in .safetensors.")
@together(train_options, learning_options)
def train(manifest: str, dev: str, output: str, as_json: bool, widths: str, **options: Any) -> None:
    """Fit a head to labelled pairs.

    TRAIN and DEV are manifests with a label in every row: 0 same person, 1 different people. Images are
    embedded through the same cache as for `score`, so a second training embeds nothing. A record of the
    training is written beside HEAD; its name ends in .training.json.
    """
    set_up(options["verbose"])
    from batchverify.training.train import train as run

    try:
        sizes = tuple(map(int, widths.split("-")))
    except ValueError as exc:
        raise click.BadParameter(f"expected numbers joined by -, got '{widths}'", param_hint="--widths") from exc
    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, dev, output, TrainOptions(widths=sizes, **options)))
