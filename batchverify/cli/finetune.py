"""`batchverify finetune`: train the last blocks of a backbone."""

from __future__ import annotations

from typing import Any

import click

from batchverify.cli.options import finetune_options, learning_options, output_option, together
from batchverify.cli.output import reporting, set_up
from batchverify.options import FinetuneOptions


@click.command()
@click.argument("manifest", metavar="TRAIN")
@click.option(
    "--dev",
    required=True,
    metavar="DEV",
    help="Manifest of pairs that choose the epoch, of people who are not in TRAIN.",
)
@output_option("BACKBONE", "Weights file to write; its name must end in .safetensors.")
@together(finetune_options, learning_options)
def finetune(manifest: str, dev: str, output: str, as_json: bool, **options: Any) -> None:
    """Train the last blocks of a backbone on labelled pairs.

    TRAIN and DEV are manifests with a label in every row: 0 same person, 1 different people. Use BACKBONE like
    any other (--backbone BACKBONE), with a head that `train` makes for it. A record of the training and a model
    card are written beside it. Nothing is written if no epoch does better on DEV than the untrained backbone.

    After a kill, Ctrl-C or a failure, run the same command again to finish the rest. Until then BACKBONE.job
    keeps the state of the run.
    """
    set_up(options["verbose"])
    from batchverify.training.finetuning.finetune import finetune as run

    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, dev, output, FinetuneOptions(**options)))
