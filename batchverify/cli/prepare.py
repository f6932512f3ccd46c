"""`batchverify prepare`: make manifests from a data set's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from batchverify.cli.options import json_option, output_option, seed_option, together
from batchverify.cli.output import show
from batchverify.manifest.prepare import DEFAULT_PAIRS, Prepared, prepare_folders, prepare_lfw

_output_option = output_option("DIR", "Folder for the manifests.")


@click.group()
def prepare() -> None:
    """Make manifests from a data set's own files."""


@prepare.command()
@click.argument("root")
@together(_output_option, seed_option, json_option)
def lfw(root: str, output: str, seed: int, as_json: bool) -> None:
    """Make the manifests of Labeled Faces in the Wild.

    ROOT is the folder of the data set. Writes train.csv, dev.csv and test.csv of View 1, and pairs.csv of
    View 2.
    """
    _report(prepare_lfw(_home(root), _home(output), seed=seed), as_json)


@prepare.command()
@click.argument("root")
@together(
    _output_option,
    seed_option,
    click.option(
        "--pairs",
        multiple=True,
        metavar="SPLIT=N",
        help=f"Pairs of each class in {', '.join(DEFAULT_PAIRS)}. Repeatable. "
        f"Default: {' '.join(f'{split}={count}' for split, count in DEFAULT_PAIRS.items())}.",
    ),
    json_option,
)
def folders(root: str, output: str, seed: int, pairs: Sequence[str], as_json: bool) -> None:
    """Make manifests from a tree with one folder per person.

    Writes train.csv, dev.csv and test.csv from the images in ROOT/PERSON. No person is in two of them.
    """
    prepared = prepare_folders(_home(root), _home(output), seed=seed, pairs=_split_counts(pairs))
    _report(prepared, as_json)


def _home(path: str) -> Path:
    """The path with `~` as the home folder: shells leave it alone in `--output=~/manifests`."""
    from batchverify.storage.location import expand_home

    return Path(expand_home(path))


def _report(prepared: Prepared, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(prepared.to_json()))
        return
    for name, path in prepared.manifests.items():
        dropped = prepared.dropped.get(name, 0)
        left_out = f", {dropped:,} left out because an image is missing" if dropped else ""
        show(f"{path}: {prepared.rows[name]:,} pairs{left_out}")
    for image in prepared.missing:
        show(f"missing: {image}", err=True)


def _split_counts(pairs: Sequence[str]) -> dict[str, int] | None:
    counts = {}
    for text in pairs:
        split, _, count = text.partition("=")
        if split not in DEFAULT_PAIRS or not count.isdigit():
            expected = ", ".join(f"{name}=N" for name in DEFAULT_PAIRS)
            raise click.BadParameter(f"expected one of {expected}, got '{text}'", param_hint="--pairs")
        counts[split] = int(count)
    return counts or None
