"""`batchverify backbones`: list the backbones, and write one as ONNX for other runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from batchverify.cli.options import json_option, output_option, together
from batchverify.cli.output import show, show_result
from batchverify.errors import UsageError

_options = together(
    click.option("--weights", metavar="PATH", help="File or folder with the published weights."),
    json_option,
)


@click.group(invoke_without_command=True)
@_options
@click.pass_context
def backbones(ctx: click.Context, weights: str | None, as_json: bool) -> None:
    """List the backbones with the location of their weights and their fingerprints.

    In other commands, --backbone takes several of these names, joined by +.
    """
    if ctx.invoked_subcommand is not None:
        if weights is not None or as_json:
            raise UsageError(f"backbones: put the options after '{ctx.invoked_subcommand}'")
        return
    from batchverify.embedding.backbone import list_backbones

    infos = list_backbones(Path(weights) if weights else None)
    if as_json:
        click.echo(json.dumps([info.to_json() for info in infos]))
    else:
        show("\n".join(line for info in infos for line in info.lines()))


@backbones.command()
@click.argument("backbone", metavar="BACKBONE")
@output_option("FILE.onnx", "ONNX file to write.")
@_options
def export(backbone: str, output: str, weights: str | None, as_json: bool) -> None:
    """Write a backbone as ONNX, for other runtimes.

    BACKBONE is a name that `backbones` lists, or a weights file. A description of the faces that the network
    takes is written beside FILE.onnx, to a file that ends in .json. Existing files are replaced. Other commands
    accept --backbone FILE.onnx. It counts as another backbone than BACKBONE and needs its own head.
    """
    from batchverify.embedding.onnx_export import export as run
    from batchverify.storage.location import expand_home

    exported = run(backbone, Path(expand_home(output)), Path(weights) if weights else None)
    show_result(exported, "\n".join(exported.lines()), as_json)
