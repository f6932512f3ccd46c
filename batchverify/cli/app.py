"""The main command and its subcommands; errors become one line and an exit code."""

from __future__ import annotations

import os
from typing import Any

import click

from batchverify.cli.backbones import backbones
from batchverify.cli.cache import cache
from batchverify.cli.calibrate import calibrate
from batchverify.cli.evaluate import evaluate
from batchverify.cli.finetune import finetune
from batchverify.cli.options import (
    backbone_options,
    cache_option,
    details_option,
    device_options,
    json_option,
    manifest_options,
    no_cache_option,
    output_option,
    overwrite_option,
    part_rows_option,
    run_options,
    talk_options,
    threshold_options,
    together,
)
from batchverify.cli.output import (
    INTERRUPTED,
    drop_unread,
    open_streams,
    reporting,
    set_up,
    show,
    show_result,
)
from batchverify.cli.prepare import prepare
from batchverify.cli.submit import submit
from batchverify.cli.train import train
from batchverify.errors import BatchverifyError, HungError
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.progress import tell
from batchverify.version import __version__

# Key of the context's `meta`: how to resume the command after Ctrl-C.
RESUME_HINT = "batchverify.resume"


class Group(click.Group):
    """Lists commands in the order of use; batchverify's errors become one line and their exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of definition."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, whatever became of the standard streams."""
        open_streams()
        try:
            return super().main(*args, **kwargs)
        finally:
            drop_unread()

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; the only place that catches `BatchverifyError`."""
        try:
            return super().invoke(ctx)
        except BatchverifyError as exc:
            show(f"batchverify: {exc}", err=True)
            if isinstance(exc, HungError):
                os._exit(exc.exit_code)
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt:
            hint = ctx.meta.get(RESUME_HINT, "run the same command to finish the rest")
            tell(f"batchverify: interrupted; finished work is kept, {hint}\n")
            ctx.exit(INTERRUPTED)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchverify", message="%(prog)s %(version)s")
def main() -> None:
    """Verify faces in tables of image pairs.

    Every row comes back with the probability that its two images show different people.

    Exit codes: 0 success; 1 the job failed; 2 wrong usage, bad manifest or bad artifact; 3 no row could be
    scored, or more rows failed than --max-failed allows; 130 interrupted.
    """


@main.command()
@click.argument("manifest")
@output_option("OUT", "A .parquet file, or a folder for part files.")
@together(
    manifest_options,
    backbone_options,
    threshold_options,
    details_option,
    overwrite_option,
    part_rows_option,
    cache_option,
    no_cache_option,
    run_options,
    talk_options,
)
def score(manifest: str, output: str, as_json: bool, **options: Any) -> None:
    """Score every pair of a manifest.

    MANIFEST is a CSV, TSV or Parquet file, a folder, a glob or a URI. OUT gets its columns and these:
    probability (of two different people), label (0 same, 1 different), similarity (cosine), status, error_a,
    error_b; with --details also what is known of each face. Every row comes back, in order.

    After a kill, Ctrl-C or a failure, run the same command again to finish the rest. Until then OUT.job
    keeps the state of the run.
    """
    set_up(options["verbose"])
    if options["overwrite"]:
        hint = "run the same command without --overwrite to finish the rest"
        click.get_current_context().meta[RESUME_HINT] = hint
    from batchverify.scoring.score import score as run

    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, output, ScoreOptions(**options)))


@main.command()
@click.argument("manifest")
@together(manifest_options, backbone_options, details_option, cache_option, run_options, talk_options)
def embed(manifest: str, as_json: bool, **options: Any) -> None:
    """Embed the images of a manifest into the cache, without scoring pairs."""
    set_up(options["verbose"])
    from batchverify.scoring.score import embed as run

    with reporting(as_json, options["quiet"]) as report:
        report(run(manifest, EmbedOptions(**options)))


@main.command()
@click.option("-i1", "--image-a", required=True, metavar="A", help="The first image.")
@click.option("-i2", "--image-b", required=True, metavar="B", help="The second image.")
@together(
    backbone_options,
    threshold_options,
    details_option,
    cache_option,
    no_cache_option,
    device_options,
    json_option,
)
def predict(image_a: str, image_b: str, as_json: bool, **options: Any) -> None:
    """Say whether two images show the same person.

    Prints the verdict and the probability that they show different people.
    """
    set_up(False)
    from batchverify.scoring.predict import predict as run

    prediction = run(image_a, image_b, ScoreOptions(**options))
    show_result(prediction, prediction.sentence(), as_json)
    prediction.require()


@main.command()
@click.argument("manifest")
@manifest_options
@click.option("--all", "every", is_flag=True, help="Check that every image file exists, not only a sample of 1,000.")
@json_option
def check(manifest: str, every: bool, as_json: bool, **options: Any) -> None:
    """Report what is wrong with a manifest.

    No image is opened. Exits with code 1 if the manifest has faults.
    """
    from batchverify.manifest.check import check_manifest
    from batchverify.manifest.manifest import Columns, Manifest

    columns = Columns(options["column_a"], options["column_b"])
    chosen = {name: options[name] for name in ("image_root", "follow_symlinks", "limit")}
    opened = Manifest.open(manifest, columns=columns, **chosen)
    report = check_manifest(opened, every=every)
    show_result(report, "\n".join(report.lines()), as_json)
    if not report.ok:
        raise click.exceptions.Exit(1)


for command in (train, finetune, calibrate, evaluate, prepare, cache, submit, backbones):
    main.add_command(command)
