"""`batchverify cache`: look after the embedding cache."""

from __future__ import annotations

import json

import click

from batchverify.cli.options import cache_option, json_option, together


@click.group()
def cache() -> None:
    """Look after the embedding cache."""


@cache.command()
@together(cache_option, json_option)
def info(cache: str | None, as_json: bool) -> None:
    """What the cache holds, by fingerprint."""
    from batchverify.cache.maintenance import cache_info
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
    from batchverify.cache.maintenance import verify_cache
    from batchverify.options import default_cache_root

    report = verify_cache(cache or default_cache_root(), quarantine=quarantine)
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
    if not report.ok:
        raise click.exceptions.Exit(1)
