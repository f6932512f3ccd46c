"""The command line: options in, a workflow called, its errors as one line."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from batchverify.cli_options import (
    backbone_options,
    cache_option,
    device_option,
    json_option,
    manifest_options,
    no_cache_option,
    output_folder,
    run_options,
    seed_option,
    talk_options,
    threshold_options,
    together,
)
from batchverify.errors import BatchverifyError, HungError, NothingScoredError
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.version import __version__

INTERRUPTED = 130


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
            click.echo("batchverify: interrupted; what was embedded is kept in the cache", err=True)
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
    cache_option,
    no_cache_option,
    run_options,
    talk_options,
)
def score(manifest: str, output: str, as_json: bool, **options: Any) -> None:
    """Score every pair of MANIFEST: a CSV, TSV or Parquet file, a folder, a glob or a URI.

    Writes the manifest's columns and: probability (of two different people), label (0 same, 1 different),
    similarity (cosine), status, error_a, error_b. Every row comes back, in order.
    """
    _set_up(options["verbose"])
    from batchverify.workflows import score as run

    with _reporting(as_json, options["quiet"]) as report:
        report(run(manifest, output, ScoreOptions(**options)))


@main.command()
@click.argument("manifest")
@together(manifest_options, backbone_options, cache_option, run_options, talk_options)
def embed(manifest: str, as_json: bool, **options: Any) -> None:
    """Embed the images of MANIFEST into the cache, and no more."""
    _set_up(options["verbose"])
    from batchverify.workflows import embed as run

    with _reporting(as_json, options["quiet"]) as report:
        report(run(manifest, EmbedOptions(**options)))


@main.command()
@click.option("-i1", "--image-a", required=True, metavar="A", help="The first image.")
@click.option("-i2", "--image-b", required=True, metavar="B", help="The second image.")
@together(backbone_options, threshold_options, cache_option, no_cache_option, device_option, json_option)
def predict(image_a: str, image_b: str, as_json: bool, **options: Any) -> None:
    """Say whether two images show the same person, with the probability that they do not."""
    _set_up(False)
    from batchverify.prediction import predict as run

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
    from batchverify.checking import check_manifest
    from batchverify.manifest import Columns, Manifest

    columns = Columns(options["column_a"], options["column_b"])
    opened = Manifest.open(
        manifest, columns=columns, image_root=options["image_root"], limit=options["limit"]
    )
    report = check_manifest(opened, every=every)
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
    if not report.ok:
        raise click.exceptions.Exit(1)


@main.group()
def prepare() -> None:
    """Make manifests from a data set's own files."""


@prepare.command()
@click.argument("root", type=click.Path(path_type=Path))
@together(output_folder, seed_option, json_option)
def lfw(root: Path, output: Path, seed: int, as_json: bool) -> None:
    """Labeled Faces in the Wild below ROOT: train.csv, dev.csv and test.csv of View 1, pairs.csv of View 2."""
    from batchverify.datasets import prepare_lfw

    _report_prepared(prepare_lfw(root, output, seed=seed), as_json)


@prepare.command()
@click.argument("root", type=click.Path(path_type=Path))
@together(
    output_folder,
    seed_option,
    click.option(
        "--pairs",
        multiple=True,
        metavar="SPLIT=N",
        help="Pairs of each class in train, dev or test; repeatable. Default: train=1024 dev=76 test=500.",
    ),
    json_option,
)
def folders(root: Path, output: Path, seed: int, pairs: Sequence[str], as_json: bool) -> None:
    """A tree of one folder per person below ROOT: train.csv, dev.csv and test.csv, no person in two of them."""
    from batchverify.datasets import prepare_folders

    _report_prepared(prepare_folders(root, output, seed=seed, pairs=_split_counts(pairs)), as_json)


@main.group()
def cache() -> None:
    """Look after the embedding cache."""


@cache.command()
@together(cache_option, json_option)
def info(cache: str | None, as_json: bool) -> None:
    """What the cache holds, by fingerprint."""
    from batchverify.cache_care import cache_info
    from batchverify.options import default_cache_root

    root = cache or default_cache_root()
    found = cache_info(root)
    if as_json:
        click.echo(json.dumps({"cache": root, "fingerprints": [each.to_json() for each in found]}))
        return
    click.echo(f"{root}: {len(found)} fingerprints")
    for each in found:
        click.echo("\n".join(each.lines()))


@cache.command()
@together(
    cache_option,
    click.option("--quarantine", is_flag=True, help="Move damaged files into a folder `quarantine`."),
    json_option,
)
def verify(cache: str | None, quarantine: bool, as_json: bool) -> None:
    """Read every segment and say what is wrong with it. Exits with 1 when something is."""
    from batchverify.cache_care import verify_cache
    from batchverify.options import default_cache_root

    report = verify_cache(cache or default_cache_root(), quarantine=quarantine)
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
    if not report.ok:
        raise click.exceptions.Exit(1)


@main.command()
@click.option("--weights", metavar="PATH", help="File or folder with published weights.")
@json_option
def backbones(weights: str | None, as_json: bool) -> None:
    """List the known backbones, where their weights lie, and their fingerprints."""
    from batchverify.backbones import list_backbones

    listed = list_backbones(Path(weights) if weights else None)
    if as_json:
        click.echo(json.dumps([each.to_json() for each in listed]))
        return
    for each in listed:
        click.echo("\n".join(each.lines()))


def _set_up(verbose: bool) -> None:
    """What a process of ours does before work: logging, SIGTERM like Ctrl-C, our size limits for Pillow's."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from batchverify.decoding import own_process

    own_process()


@contextmanager
def _reporting(as_json: bool, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """Hands out what takes the summary; it is shown at the end, also when too few rows were scored.

    A live Ray prints to stdout when a worker dies, and stdout is for the summary alone.
    """
    summaries: list[Any] = []
    try:
        with redirect_stdout(sys.stderr):
            yield summaries.append
    except NothingScoredError as exc:
        summaries.append(exc.summary)
        raise
    finally:
        for summary in summaries:
            if as_json:
                click.echo(json.dumps(summary.to_json()))
            elif not quiet:
                _table(summary.lines())


def _report_prepared(prepared: Any, as_json: bool) -> None:
    if as_json:
        files = {name: str(path) for name, path in prepared.manifests.items()}
        report = {
            "manifests": files,
            "rows": prepared.rows,
            "missing": prepared.missing,
            "dropped": prepared.dropped,
        }
        click.echo(json.dumps(report))
        return
    for name, path in prepared.manifests.items():
        dropped = prepared.dropped.get(name, 0)
        left_out = f", {dropped:,} left out for want of an image" if dropped else ""
        click.echo(f"{path}: {prepared.rows[name]:,} pairs{left_out}")
    for path in prepared.missing:
        click.echo(f"missing: {path}", err=True)


def _table(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name.ljust(width)}  {value}", err=True)


def _split_counts(pairs: Sequence[str]) -> dict[str, int] | None:
    counts = {}
    for each in pairs:
        split, _, count = each.partition("=")
        if split not in ("train", "dev", "test") or not count.isdigit():
            raise click.BadParameter(f"train=N, dev=N or test=N expected, got '{each}'", param_hint="--pairs")
        counts[split] = int(count)
    return counts or None


if __name__ == "__main__":
    sys.exit(main())
