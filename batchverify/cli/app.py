"""The command line: options in, a workflow called, its errors as one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from batchverify.cli.cache import cache
from batchverify.cli.evaluate import evaluate
from batchverify.cli.options import (
    backbone_options,
    cache_option,
    device_options,
    json_option,
    manifest_options,
    no_cache_option,
    overwrite_option,
    run_options,
    talk_options,
    threshold_options,
    together,
)
from batchverify.cli.output import reporting, set_up
from batchverify.cli.prepare import prepare
from batchverify.cli.submit import submit
from batchverify.cli.train import train
from batchverify.errors import BatchverifyError, HungError
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.version import __version__

INTERRUPTED = 130
# Where a command says how it is taken up again after Ctrl-C.
AGAIN = "batchverify.again"


class Group(click.Group):
    """Commands in the order of a first day's work; our errors become one line and their exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of definition."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; the one `except` for the root of our errors."""
        try:
            return super().invoke(ctx)
        except BatchverifyError as exc:
            click.echo(f"batchverify: {exc}", err=True)
            if isinstance(exc, HungError):
                os._exit(exc.exit_code)
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt:
            again = ctx.meta.get(AGAIN, "the same command does the rest")
            click.echo(f"batchverify: interrupted; what was done is kept, {again}", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchverify", message="%(prog)s %(version)s")
def main() -> None:
    """Face verification of whole tables of image pairs: every row comes back with a probability.

    Exit codes: 0 done; 1 the job failed; 2 wrong usage, bad manifest or bad artifact; 3 no row could be
    scored, or more than --max-failed; 130 interrupted.
    """


@main.command()
@click.argument("manifest")
@click.option(
    "-o", "--output", required=True, metavar="OUT", help="A .parquet file, or a folder for part files."
)
@together(
    manifest_options,
    backbone_options,
    threshold_options,
    overwrite_option,
    cache_option,
    no_cache_option,
    run_options,
    talk_options,
)
def score(manifest: str, output: str, as_json: bool, **options: Any) -> None:
    """Score every pair of MANIFEST: a CSV, TSV or Parquet file, a folder, a glob or a URI.

    Writes the manifest's columns and: probability (of two different people), label (0 same, 1 different),
    similarity (cosine), status, error_a, error_b. Every row comes back, in order.

    After a kill, Ctrl-C or a failure the same command does what is missing; what it needs for that lies in
    OUT.job until it is done.
    """
    set_up(options["verbose"])
    if options["overwrite"]:
        click.get_current_context().meta[AGAIN] = "the same command without --overwrite does the rest"
    from batchverify.scoring.score import score as run

    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, output, ScoreOptions(**options)))


@main.command()
@click.argument("manifest")
@together(manifest_options, backbone_options, cache_option, run_options, talk_options)
def embed(manifest: str, as_json: bool, **options: Any) -> None:
    """Embed the images of MANIFEST into the cache, and no more."""
    set_up(options["verbose"])
    from batchverify.scoring.score import embed as run

    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, EmbedOptions(**options)))


@main.command()
@click.option("-i1", "--image-a", required=True, metavar="A", help="The first image.")
@click.option("-i2", "--image-b", required=True, metavar="B", help="The second image.")
@together(backbone_options, threshold_options, cache_option, no_cache_option, device_options, json_option)
def predict(image_a: str, image_b: str, as_json: bool, **options: Any) -> None:
    """Say whether two images show the same person, with the probability that they do not."""
    set_up(False)
    from batchverify.scoring.predict import predict as run

    prediction = run(image_a, image_b, ScoreOptions(**options))
    click.echo(json.dumps(prediction.to_json()) if as_json else prediction.sentence())
    prediction.require()


@main.command()
@click.argument("manifest")
@manifest_options
@click.option("--all", "every", is_flag=True, help="Look for every image file, not only a sample of 1,000.")
@json_option
def check(manifest: str, every: bool, as_json: bool, **options: Any) -> None:
    """Say what is wrong with MANIFEST before anything is embedded. Exits with 1 when something is."""
    from batchverify.manifest.check import check_manifest
    from batchverify.manifest.manifest import Columns, Manifest

    columns = Columns(options["column_a"], options["column_b"])
    opened = Manifest.open(
        manifest, columns=columns, image_root=options["image_root"], limit=options["limit"]
    )
    report = check_manifest(opened, every=every)
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
    if not report.ok:
        raise click.exceptions.Exit(1)


main.add_command(train)
main.add_command(evaluate)
main.add_command(prepare)
main.add_command(cache)
main.add_command(submit)


@main.command()
@click.option("--weights", metavar="PATH", help="File or folder with published weights.")
@json_option
def backbones(weights: str | None, as_json: bool) -> None:
    """List the known backbones, where their weights lie, and their fingerprints."""
    from batchverify.embedding.backbone import list_backbones

    listed = list_backbones(Path(weights) if weights else None)
    if as_json:
        click.echo(json.dumps([each.to_json() for each in listed]))
        return
    for each in listed:
        click.echo("\n".join(each.lines()))
