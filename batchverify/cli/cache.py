"""`batchverify cache`: inspect and verify the embedding cache."""

from __future__ import annotations

import json

import click

from batchverify.cli.options import cache_option, json_option, together
from batchverify.cli.output import show, show_result
from batchverify.options import default_cache_root


@click.group()
def cache() -> None:
    """Inspect and verify the embedding cache."""


@cache.command()
@together(cache_option, json_option)
def info(cache: str | None, as_json: bool) -> None:
    """Show what the cache holds, by fingerprint."""
    from batchverify.cache.maintenance import cache_info

    root = cache or default_cache_root()
    entries = cache_info(root)
    if as_json:
        click.echo(json.dumps({"cache": root, "fingerprints": [entry.to_json() for entry in entries]}))
        return
    click.echo(f"{root}: {len(entries)} fingerprints")
    for entry in entries:
        show("\n".join(entry.lines()))


@cache.command()
@together(
    cache_option,
    click.option(
        "--quarantine", is_flag=True, help="Move damaged files into the folder `quarantine` of the cache."
    ),
    json_option,
)
def verify(cache: str | None, quarantine: bool, as_json: bool) -> None:
    """Read every cache file and report damage. Exits with code 1 if there is any."""
    from batchverify.cache.maintenance import verify_cache

    report = verify_cache(cache or default_cache_root(), quarantine=quarantine)
    show_result(report, "\n".join(report.lines()), as_json)
    if not report.ok:
        raise click.exceptions.Exit(1)
