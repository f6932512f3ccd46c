"""`batchverify cache`: inspect, verify and compact the embedding cache, and erase images from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from batchverify.cli.options import cache_option, column_options, json_option, option, together
from batchverify.cli.output import show, show_result
from batchverify.errors import UsageError
from batchverify.options import default_cache_root

if TYPE_CHECKING:
    from batchverify.cache.image_keys import ImageKeys
    from batchverify.cache.rewriting import Erasure
    from batchverify.evaluation.scores import Appearances

# Images that cannot be read and are named one by one.
SHOWN = 10


@click.group()
def cache() -> None:
    """Look after the embedding cache."""


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
    click.option("--quarantine", is_flag=True, help="Move damaged files into the folder `quarantine` of the cache."),
    json_option,
)
def verify(cache: str | None, quarantine: bool, as_json: bool) -> None:
    """Read every cache file and report damage. Exits with code 1 if there is any."""
    from batchverify.cache.maintenance import verify_cache

    report = verify_cache(cache or default_cache_root(), quarantine=quarantine)
    show_result(report, "\n".join(report.lines()), as_json)
    if not report.ok:
        raise click.exceptions.Exit(1)


@cache.command()
@together(cache_option, json_option)
def compact(cache: str | None, as_json: bool) -> None:
    """Merge small cache files into larger ones, while runs read and write.

    Runs start faster on fewer files. Rows that are there twice are dropped. Results stay the same.

    Exits with code 1 if a file is damaged. It stays as it is, and all others are merged.
    """
    from batchverify.cache.rewriting import compact as run

    report = run(cache or default_cache_root())
    show_result(report, "\n".join(report.lines()), as_json)
    if report.damaged:
        raise click.exceptions.Exit(1)


@cache.command()
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@together(
    click.option("--manifest", metavar="MANIFEST", help="Also forget all images of a manifest."),
    option(
        "--image-root",
        "Folder or URI that relative image paths start from. Default: the current folder, for a manifest its own.",
        "DIR",
    ),
    column_options,
    click.option(
        "--key",
        "hex_keys",
        multiple=True,
        metavar="SHA256",
        help="Also forget the image whose bytes have this SHA-256, for images that are gone. May be repeated.",
    ),
    click.option(
        "--outputs",
        multiple=True,
        metavar="OUT",
        help="Say how many rows of this output name the images; it is not changed. May be repeated.",
    ),
    click.option(
        "--delete-damaged",
        is_flag=True,
        help="Also delete damaged cache files, which may hold the images: they cannot be searched.",
    ),
    cache_option,
    json_option,
)
def forget(images: tuple[str, ...], cache: str | None, as_json: bool, **options: Any) -> None:
    """Erase the face vectors and failures of images from the cache for good.

    No byte of them stays in the cache's files. An image is found by its content, so it has to be readable, at
    any place and under any name; give --key for one that is gone. A run that meets the image again puts it back.

    Exits with code 1 if an image could not be read, or if a damaged file could not be searched.
    """
    from batchverify.cache.image_keys import keys_of, parse_key, possible_keys
    from batchverify.cache.rewriting import erase
    from batchverify.evaluation.scores import find_appearances
    from batchverify.manifest.manifest import Columns

    extra = [parse_key(text) for text in options["hex_keys"]]
    if not (images or extra or options["manifest"]):
        raise UsageError("name an image, a --manifest or a --key")
    columns = Columns(options["column_a"], options["column_b"])
    found = keys_of(images, options["manifest"], columns=columns, image_root=options["image_root"])
    named = {*found.digests, *found.unread}
    # First, so that a wrong output is reported before anything is erased.
    appearances = [find_appearances(output, named) for output in options["outputs"]]
    digests = {*found.digests.values(), *extra}
    keys = {key for digest in digests for key in possible_keys(digest)}
    erased = erase(cache or default_cache_root(), keys, delete_damaged=options["delete_damaged"])
    if as_json:
        document = {"unread": found.unread, "outputs": [vars(each) for each in appearances]}
        click.echo(json.dumps({"keys": len(digests), **erased.to_json(), **document}))
    else:
        show("\n".join(_forgotten(found, digests, erased, appearances)))
    if found.unread or erased.unsearched:
        raise click.exceptions.Exit(1)


def _forgotten(found: ImageKeys, digests: set[bytes], erased: Erasure, appearances: list[Appearances]) -> list[str]:
    """What `forget` did, for people."""
    from batchverify.cache.image_keys import possible_keys

    unread = list(found.unread.items())
    lines = [f"{path}: not forgotten, it cannot be read: {why}" for path, why in unread[:SHOWN]]
    if len(unread) > SHOWN:
        lines.append(f"and {len(unread) - SHOWN:,} more that cannot be read")
    lines += [f"{path}: may hold the images, it cannot be searched: {why}" for path, why in erased.unsearched.items()]
    lines += [f"{each.output}: {each.rows:,} rows name {each.images:,} of the images" for each in appearances]
    rows = f"{erased.vectors:,} vectors and {erased.failures:,} failures erased"
    files = f"{erased.rewritten:,} cache files written anew, {erased.deleted:,} deleted"
    there = sum(not erased.found.isdisjoint(possible_keys(digest)) for digest in digests)
    return [*lines, f"{there:,} of {len(digests):,} images were in the cache: {rows}; {files}"]
