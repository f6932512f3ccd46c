"""`batchverify prepare`: manifests from a data set's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from batchverify.cli.options import json_option, output_folder, seed_option, together


@click.group()
def prepare() -> None:
    """Make manifests from a data set's own files."""


@prepare.command()
@click.argument("root", type=click.Path(path_type=Path))
@together(output_folder, seed_option, json_option)
def lfw(root: Path, output: Path, seed: int, as_json: bool) -> None:
    """Labeled Faces in the Wild below ROOT: train.csv, dev.csv and test.csv of View 1, pairs.csv of View 2."""
    from batchverify.manifest.prepare import prepare_lfw

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
    from batchverify.manifest.prepare import prepare_folders

    _report_prepared(prepare_folders(root, output, seed=seed, pairs=_split_counts(pairs)), as_json)


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


def _split_counts(pairs: Sequence[str]) -> dict[str, int] | None:
    counts = {}
    for each in pairs:
        split, _, count = each.partition("=")
        if split not in ("train", "dev", "test") or not count.isdigit():
            raise click.BadParameter(f"train=N, dev=N or test=N expected, got '{each}'", param_hint="--pairs")
        counts[split] = int(count)
    return counts or None
