"""`batchverify train`: a head from labelled pairs."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import (
    backbone_options,
    cache_option,
    manifest_options,
    no_cache_option,
    run_options,
    talk_options,
    together,
    train_options,
)
from batchverify.cli.output import reporting, set_up


@click.command()
@click.argument("manifest", metavar="TRAIN")
@click.option(
    "--dev", required=True, metavar="DEV", help="Manifest of pairs that calibrate and stop the training."
)
@click.option(
    "-o", "--output", required=True, metavar="HEAD", help="The head's file, ending in .safetensors."
)
@together(
    train_options,
    manifest_options,
    backbone_options,
    cache_option,
    no_cache_option,
    run_options,
    talk_options,
)
def train(manifest: str, dev: str, output: str, as_json: bool, widths: str, **options: Any) -> None:
    """Fit a head to the labelled pairs of TRAIN (label 0 same, 1 different, in every row).

    Images are embedded through the same cache as `score`: a second training embeds nothing. Beside HEAD goes
    a record of the training, HEAD with the ending .training.json.
    """
    set_up(options["verbose"])
    from batchverify.options import TrainOptions
    from batchverify.training.train import train as run

    try:
        sizes = tuple(int(each) for each in widths.split("-"))
    except ValueError as exc:
        raise click.BadParameter(
            f"numbers joined by - expected, got '{widths}'", param_hint="--widths"
        ) from exc
    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, dev, output, TrainOptions(widths=sizes, **options)))
