"""`batchverify score` from start to exit: `python benchmarks/score.py [ROOT] [--synthetic N] [--beside CHECKOUT]`.

Cold and warm cache, the other paths of a CPU and the compact backbone, beside `benchmarks/peer.py`, which does the
same manifest with facenet-pytorch; then four sizes, to see how time and memory grow.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import faces
from results import publish, table

from batchverify.runtime.devices import available_cpus, resolve_device

SIZES = (500, 1000, 2500, 4992)
# Beside the defaults, on a CPU.
CROPS = ("detect", "center")
OTHER_WAYS = (["--dtype", "float32"], ["--runtime", "torch"])
# Beside the detected crop: its own crop is an aligned face.
COMPACT = ["--backbone", "compact"]
# A process counts the memory of the one that started it into its peak: a small one stands between, and keeps the
# peak of the command alone.
BETWEEN = """
import pathlib, resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[2:]])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(done.returncode)
"""


@dataclass(frozen=True)
class Run:
    """One process: seconds from start to exit, peak memory in MB, what it said on stdout."""

    seconds: float
    megabytes: float
    said: str


def run(*command: str, checkout: Path | None = None) -> Run:
    """Run a Python program to its end, with another checkout's package; its failure ends the benchmark."""
    # With `-m` the working folder comes before PYTHONPATH.
    package = checkout or Path(__file__).parent.parent
    variables = {**os.environ, "PYTHONPATH": str(package)}
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile("r") as peak:
        between = [sys.executable, "-c", BETWEEN, peak.name]
        done = subprocess.run([*between, *command], stdout=subprocess.PIPE, text=True, env=variables, cwd=package)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed")
        return Run(seconds, int(Path(peak.name).read_text()) / 1024, done.stdout)


def score(manifest: Path, cache: Path, *options: str, checkout: Path | None = None) -> Run:
    """A run of ours, or of another checkout's package."""
    output = str(manifest.with_suffix(".parquet"))
    command = ["-m", "batchverify.cli", "score", str(manifest), "-o", output, "--cache", str(cache)]
    return run(*command, "--json", "--overwrite", *options, checkout=checkout)


def ways(device: str, crop: str, beside: Path | None) -> list[tuple[str, list[str], Path | None]]:
    """(name, options, checkout) of every path that a device has; the first is the default."""
    cut = ["--crop", crop]
    found: list[tuple[str, list[str], Path | None]] = [("ours", cut, None)]
    if device == "cpu":
        found += [(f"ours, {' '.join(each)}", [*cut, *each], None) for each in OTHER_WAYS]
    if crop == "detect":
        found.append((f"ours, {' '.join(COMPACT)}", COMPACT, None))
    return found + ([(f"{beside.name}, another checkout", cut, beside)] if beside else [])


def compared(manifest: Path, folder: Path, crop: str, device: str, beside: Path | None) -> list[list[str]]:
    """Peer, cold and warm runs of one crop."""
    script = str(Path(__file__).parent / "peer.py")
    peer = run(script, str(manifest), str(folder / "peer.parquet"), crop, resolve_device(device))
    rows = [[f"{crop}: facenet-pytorch script", f"{peer.seconds:.1f}", "1.00", f"{peer.megabytes:,.0f}", ""]]
    for number, (name, options, checkout) in enumerate(ways(resolve_device(device), crop, beside)):
        cache = folder / f"cache-{crop}-{number}"
        for state in ("cold cache", "warm cache")[: 1 if number else 2]:
            ours = score(manifest, cache, "--device", device, *options, checkout=checkout)
            ratio = f"{peer.seconds / ours.seconds:.2f}"
            row = [f"{crop}: {name}, {state}", f"{ours.seconds:.1f}", ratio, f"{ours.megabytes:,.0f}"]
            rows.append([*row, stages(json.loads(ours.said), ours.seconds)])
    return rows


def stages(summary: dict, took: float) -> str:
    """Where the time went, by the run's own account; of cold runs the rate from files to vectors as well.

    took: seconds from start to exit, beside what the stages took themselves, on as many CPUs as there are.
    """
    found = summary.get("stage_seconds", {})
    parts = [f"{name} {seconds:.1f}" for name, seconds in found.items()]
    rate = f"{summary['images_per_second']:,.1f} images/s, embedder busy {summary['embedder_busy']:.0%}"
    own = (sum(found.values()) - found.get("wait", 0.0)) / available_cpus()
    path = [rate, summary["compute_path"], f"end to end / stages {took / own:.2f}"] if summary["embedded"] else []
    return ", ".join([f"engine {summary['engine']}", *path, *parts])


@click.option("--crop", "crops", type=click.Choice(CROPS), multiple=True, default=CROPS, show_default=True)
@faces.image_options
def main(
    root: Path | None,
    synthetic: int | None,
    device: str,
    beside: Path | None,
    record: bool,
    crops: tuple[str, ...],
) -> None:
    """Print the table."""
    header = [
        "run",
        "seconds",
        "peer's time / it",
        "peak MB of its process",
        "stages, seconds of all workers",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = faces.manifest(folder, root, synthetic)
        total = len(faces.images(manifest))
        rows = [row for crop in crops for row in compared(manifest, folder, crop, device, beside)]
        for size in (each for each in SIZES if each <= total and "detect" in crops):
            ours = score(faces.cut(manifest, size), folder / f"cache-{size}", "--device", device)
            rows.append([f"detect: ours, cold, {size:,} images", f"{ours.seconds:.1f}", "", f"{ours.megabytes:,.0f}"])
            rows[-1].append(stages(json.loads(ours.said), ours.seconds))
    command = faces.command_line("score.py", root, synthetic, device, beside)
    if crops != CROPS:
        command += "".join(f" --crop {crop}" for crop in crops)
    publish(f"Score, {total:,} images", command, table(header, rows), record=record)


if __name__ == "__main__":
    main()
