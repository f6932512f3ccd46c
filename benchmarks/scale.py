"""How `score` grows: `python benchmarks/scale.py workers|pairs|rate|lfw [--record]`, see `--help` of each.

`workers`: 1, 2 and 4 Ray workers with an embedder that sleeps. `pairs`: sizes of manifests, cold with a counting
stand-in for the embedder (or with a cache filled beforehand), warm, and finished. `rate`: pairs/s of a warm run
beside the plain loop of `pairs.py`. `lfw`: the image stage, cold and warm, with detection.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import faces
import numpy as np
import pairs as plain_pairs
from results import publish, table
from score import Run, run
from standin import (
    StandInJob,
    StandInPlan,
    counted,
    fill_cache,
    make_images,
    make_manifest,
    options_for,
    unit_vectors,
)

from batchverify.engine.ray.engine import RayEngine
from batchverify.engine.scheduler import ImageRun
from batchverify.engine.stages import LoadPlan
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.progress import Progress
from batchverify.scoring.score import score_job

SETTINGS = EmbeddingSettings(crop="none")
record_option = click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
folder_option = click.option(
    "--folder", type=click.Path(path_type=Path), help="Keep images and manifests there for the next run."
)


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that goes afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@main.command()
@click.option("--count", "counts", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--each", default=3072, show_default=True, help="Images per worker.")
@click.option("--seconds", default=0.02, show_default=True, help="Sleep per image.")
@record_option
def workers(counts: tuple[int, ...], each: int, seconds: float, record: bool) -> None:
    """Images/s by the number of Ray workers, one CPU each by Ray's books; each job takes about a minute."""
    header = ["workers", "images", "seconds", "images/s", "against the first"]
    header += ["share of the sleeping rate", "embedded"]
    rows: list[list[str]] = []
    first = 0.0
    with place(None) as folder:
        make_images(folder / "images", each * max(counts))
        for count in counts:
            took, embedded = sleeping_run(folder, count, each * count, seconds)
            rate = each * count / took
            first = first or rate
            ideal = rate * seconds / count
            rows.append([str(count), f"{each * count:,}", f"{took:.1f}", f"{rate:.1f}", f"{rate / first:.2f}"])
            rows[-1] += [f"{ideal:.1%}", f"{embedded:,}"]
            print(rows[-1], flush=True)
    command = f"python benchmarks/scale.py workers --each {each} --seconds {seconds}"
    publish("Workers with an embedder that sleeps, start-up left out", command, table(header, rows), record=record)


def sleeping_run(folder: Path, count: int, images: int, seconds: float) -> tuple[float, int]:
    """Seconds of one run, begun when every worker has embedded something, and how many it embedded."""
    log = folder / f"{count}.log"
    load = LoadPlan(SETTINGS, EmbeddingFingerprint.of("70" * 32, SETTINGS))
    engine = RayEngine(StandInPlan(load, "stand-in", log=str(log), seconds=seconds), None, num_cpus=count)
    references = sorted(map(str, (folder / "images").rglob("*.bmp")))[:images]
    try:
        while len(counted(log)) < count:
            ImageRun(engine, references[: 64 * count], None, Progress(quiet=True)).run()
        before = sum(counted(log).values())
        started = time.perf_counter()
        ImageRun(engine, references, None, Progress(quiet=True)).run()
        return time.perf_counter() - started, sum(counted(log).values()) - before
    finally:
        engine.close()


@main.command(name="pairs")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    help="PAIRS:IMAGES, several times.",
    default=("100000:20000", "1000000:200000"),
)
@click.option("--filled", is_flag=True, help="No cold run: the cache is filled beforehand, in no time of the table.")
@click.option("--engine", type=click.Choice(["auto", "local", "ray"]), default="auto", show_default=True)
@click.option("--output", "kind", type=click.Choice(["file", "folder"]), default="file", show_default=True)
@folder_option
@record_option
def sizes_command(
    sizes: tuple[str, ...], filled: bool, engine: str, kind: str, folder: Path | None, record: bool
) -> None:
    """Seconds per million pairs and the peak memory of every process, by the size of the manifest."""
    header = ["run", "pairs", "images", "seconds", "a million pairs", "image stage", "driver MB"]
    header += ["a worker's MB", "embedded", "engine, stages in seconds of all workers"]
    rows, peaks = [], []
    with place(folder) as kept:
        for size in sizes:
            count, images = (int(each) for each in size.split(":"))
            for name, done in passes(kept, count, images, filled, ["--engine", engine], kind):
                summary = json.loads(done.said)
                rows.append([name, f"{count:,}", f"{images:,}", *cells(done, summary, count)])
                print(rows[-1], flush=True)
                if name == "warm":
                    peaks.append(summary["peak_memory_mb"]["driver"])
    text = table(header, rows)
    if len(peaks) > 1:
        text += f"\n\nThe driver's peak, warm, last size / first: {peaks[-1] / peaks[0]:.2f}"
    arguments = [f"--size {size}" for size in sizes] + ["--filled"] * filled + [f"--engine {engine} --output {kind}"]
    publish("Sizes", f"python benchmarks/scale.py pairs {' '.join(arguments)}", text, record=record)


def passes(
    folder: Path, pairs: int, images: int, filled: bool, arguments: list[str], kind: str
) -> Iterator[tuple[str, Run]]:
    """Each run over a manifest: its name and what it took, from process start to exit."""
    manifest, cache = folder / f"{pairs}-{images}.csv", folder / f"cache-{pairs}-{images}"
    make_images(folder / "images", images)
    if not manifest.exists():
        make_manifest(manifest, pairs, images)
    output = str(folder / (f"out-{pairs}.parquet" if kind == "file" else f"out-{pairs}"))
    if filled:
        fill_cache(manifest, options_for(cache, folder / "images"))
    else:
        yield (
            "cold",
            run(__file__, "cold", str(manifest), output, str(cache), str(folder / "images"), *arguments),
        )
    again = partial(warm, manifest, output, cache, folder / "images", *arguments)
    yield "warm", again("--overwrite")
    yield "finished", again()


def warm(manifest: Path, output: str, cache: Path, root: Path, *arguments: str) -> Run:
    """The command itself."""
    where = ["--cache", str(cache), "--image-root", str(root), "--crop", "none", "--json", "-q"]
    return run("-m", "batchverify.cli", "score", str(manifest), "-o", output, *where, *arguments)


def cells(done: Run, summary: dict, pairs: int) -> list[str]:
    """The columns from `seconds` on."""
    peak = summary["peak_memory_mb"]
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["stage_seconds"].items())
    return [
        f"{done.seconds:.1f}",
        f"{done.seconds / pairs * 1e6:.1f}",
        f"{summary['image_seconds']:.1f}",
        f"{peak['driver']:,.0f}",
        f"{peak['workers']:,.0f}" if "workers" in peak else "",
        f"{summary['embedded']:,}",
        f"{summary['engine']}: {stages}",
    ]


@main.command(hidden=True)
@click.argument("manifest", type=click.Path(path_type=Path))
@click.argument("output")
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--engine", default="auto")
def cold(manifest: Path, output: str, cache: Path, root: Path, engine: str) -> None:
    """One run with the stand-in; its summary as JSON. Every image must have been embedded once."""
    log = manifest.with_suffix(".log")
    log.unlink(missing_ok=True)
    options = options_for(cache, root, engine=engine, overwrite=True)
    summary = score_job(StandInJob.of(manifest, options, log, 0.0), options, output)
    if sum(counted(log).values()) != summary.unique_images:
        raise click.ClickException(f"{sum(counted(log).values())} embedded, not {summary.unique_images}")
    print(json.dumps(summary.to_json()))


@main.command()
@click.option("--pairs", default=10_000_000, show_default=True)
@click.option("--images", default=100_000, show_default=True)
@folder_option
@record_option
def rate(pairs: int, images: int, folder: Path | None, record: bool) -> None:
    """Pairs/s of a warm run, output written and columns carried, beside the plain loop on vectors in memory."""
    rows = []
    with place(folder) as kept:
        before = plain_rate(images)
        runs = {kind: dict(passes(kept, pairs, images, True, [], kind))["warm"] for kind in ("file", "folder")}
        # Its rate varies by half from one minute to the next: the better of before and after counts.
        loop = max(before, plain_rate(images))
        rows.append(["plain loop, all in memory", f"{loop:,.0f}", "1.00", "", ""])
        for kind, done in runs.items():
            summary = json.loads(done.said)
            after = done.seconds - summary["image_seconds"]
            for name, seconds in (
                ("process start to exit", done.seconds),
                ("without the image stage", after),
            ):
                each = pairs / seconds
                rows.append([f"score to a {kind}, {name}", f"{each:,.0f}", f"{each / loop:.2f}", f"{seconds:.1f}"])
                rows[-1].append(cells(done, summary, pairs)[-1])
                print(rows[-1], flush=True)
    command = f"python benchmarks/scale.py rate --pairs {pairs} --images {images}"
    header = ["run", "pairs/s", "/ plain loop", "seconds", "engine, stages in seconds of all workers"]
    publish(
        f"Pairs from a warm cache, {pairs:,} over {images:,} images",
        command,
        table(header, rows),
        record=record,
    )


def plain_rate(images: int, pairs: int = 1_000_000) -> float:
    """Pairs/s of the loop in `pairs.py` with the default head, the best of its batches."""
    head = plain_pairs.build(*plain_pairs.KINDS["default (distance:chi2sum)"])
    vectors = unit_vectors(images).astype(np.float16)
    a, b = np.random.default_rng(1).integers(0, images, (2, pairs))
    loops: list[Callable[[], None]] = [
        partial(plain_pairs.plain, head, vectors, a, b, size) for size in plain_pairs.PLAIN_BATCHES
    ]
    return max(plain_pairs.rate(pairs, loop) for loop in loops)


@main.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(["auto", "local", "ray"]), default="auto", show_default=True)
@record_option
def lfw(root: Path, engine: str, record: bool) -> None:
    """LFW's View 1 with detection, cold and warm: seconds of the image stage."""
    header = ["run", "images", "image stage, seconds", "cold / it", "process start to exit", "embedded"]
    rows, first = [], 0.0
    with place(None) as folder:
        manifest = faces.manifest(folder, root, None)
        images = len(faces.images(manifest))
        output, cache = str(folder / "out.parquet"), folder / "cache"
        for name in ("cold", "warm", "finished"):
            options = ["--engine", engine, "--cache", str(cache), "--json", "-q"]
            options += ["--overwrite"] if name == "warm" else []
            done = run("-m", "batchverify.cli", "score", str(manifest), "-o", output, *options)
            summary = json.loads(done.said)
            stage = summary["image_seconds"]
            first = first or stage
            ratio = f"{first / stage:.1f}" if stage else ""
            rows.append(
                [
                    name,
                    f"{images:,}",
                    f"{stage:.2f}",
                    ratio,
                    f"{done.seconds:.1f}",
                    f"{summary['embedded']:,}",
                ]
            )
            print(rows[-1], flush=True)
    command = f"python benchmarks/scale.py lfw ROOT --engine {engine}"
    publish("LFW, cold and warm, with detection", command, table(header, rows), record=record)


if __name__ == "__main__":
    main()
