"""One path of ours in a process of its own, for `embed.py` and `detect.py`: its rate, and what it found.

Uses only what older checkouts have, too: with PYTHONPATH it measures the package of another one.
"""

import inspect
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 4.0
# Images that a detector is given at once: few, so that all threads end at the same time.
GROUP = 16


@dataclass(frozen=True)
class Way:
    """A way of computing to measure.

    options: those of `Embedder`. checkout: whose package, None for this one's.
    """

    name: str
    options: dict[str, Any]
    checkout: Path | None = None


@dataclass(frozen=True)
class Measured:
    """What a process printed. path: its compute path. rate: images/s. found: detections, or None."""

    path: str
    rate: float
    found: Any = None


def rate(work: Callable[[], int]) -> float:
    """Images a second: the best of rounds that take some seconds together, after one to warm up."""
    work()
    rates: list[float] = []
    begun = time.perf_counter()
    while not rates or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        rates.append(work() / (time.perf_counter() - started))
    return max(rates)


def measured(kind: str, images: list[np.ndarray], path: Way) -> Measured:
    """Run a path over images in a process of its own. kind: `embed` (faces) or `detect` (pictures)."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "images", Path(folder) / "answer"
        given.write_bytes(pickle.dumps(images))
        command = [sys.executable, __file__, kind, str(given), str(answer), json.dumps(path.options)]
        package = path.checkout or Path(__file__).parent.parent
        variables = {**os.environ, "PYTHONPATH": str(package)}
        subprocess.run(command, env=variables, check=True)
        return Measured(*pickle.loads(answer.read_bytes()))


def _embed(images: list[np.ndarray], options: dict[str, Any]) -> tuple[str, float, None]:
    embedder, pool, workers = _embedder(crop="none", **options)
    pixels = np.stack(images)
    parts = [pixels[start : start + workers.chunk] for start in range(0, len(pixels), workers.chunk)]

    def run() -> int:
        list(pool.map(embedder.vectors, parts))
        return len(pixels)

    return str(embedder.compute_path), rate(run), None


def _detect(images: list[np.ndarray], options: dict[str, Any]) -> tuple[str, float, list[Any]]:
    embedder, pool, _ = _embedder(crop="detect", **options)
    parts = [images[start : start + GROUP] for start in range(0, len(images), GROUP)]
    list(pool.map(embedder._detector, parts[:4]))
    started = time.perf_counter()
    found = list(pool.map(embedder._detector, parts))
    took = time.perf_counter() - started
    boxes = [(each.boxes, each.scores) for group in found for each in group]
    return str(embedder.compute_path), len(images) / took, boxes


def _embedder(**options: Any) -> tuple[Any, ThreadPoolExecutor, Any]:
    """An embedder, and a pool with the threads of the local engine."""
    embedder_class = _module("embedding.embedder", "embedder").Embedder
    engine = _module("engine.base", "engine")
    _module("process", "memory").keep_freed_memory()
    cpus = len(os.sched_getaffinity(0))
    workers = engine.Workers.for_cpus(cpus, engine.visible_gpus(options.get("device", "auto")))
    parameters = inspect.signature(embedder_class).parameters
    if "workers" in parameters:
        options |= {"workers": workers.count, "threads": workers.threads}
    if "dtype" in options and "dtype" not in parameters:
        options["numbers"] = options.pop("dtype")
    embedder = embedder_class(**options)
    torch = sys.modules.get("torch")
    begin = (lambda: torch.set_num_threads(workers.threads)) if torch else None
    return embedder, ThreadPoolExecutor(workers.count, initializer=begin), workers


def _module(*names: str) -> Any:
    """The module of the package under the first of its names that is there: older checkouts had others."""
    package = Path(import_module("batchverify").__file__ or "").parent
    for name in names:
        # An editable installation would find what another checkout lacks in its own.
        if (package / f"{name.replace('.', '/')}.py").is_file():
            return import_module(f"batchverify.{name}")
    raise ModuleNotFoundError(f"none of {', '.join(names)} in {package}")


if __name__ == "__main__":
    work = {"embed": _embed, "detect": _detect}[sys.argv[1]]
    result = work(pickle.loads(Path(sys.argv[2]).read_bytes()), json.loads(sys.argv[4]))
    Path(sys.argv[3]).write_bytes(pickle.dumps(result))
