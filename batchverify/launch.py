"""Which engine a run gets, and its cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache, KeyIndex
from batchverify.engine.base import Engine, Workers, WorkPlan, visible_gpus
from batchverify.engine.stages import Loader, LoadPlan
from batchverify.engine.threads import LocalEngine
from batchverify.faces.images import read_image
from batchverify.job import Job
from batchverify.progress import Progress
from batchverify.records import Skipped
from batchverify.runtime.devices import available_cpus

# Up to so many images to embed, some minutes of work, threads are the faster engine: on two cores a local Ray
# takes 8 s to start and stop and a fifth of the rate. Beyond, it matters more that no image can end the run.
RAY_WORTH_IMAGES = 10_000
SAMPLE = 64


@contextmanager
def engine_of(
    job: Job, progress: Progress, wanted: np.ndarray | None = None, path: str = ""
) -> Iterator[tuple[Engine, EmbeddingCache | None]]:
    """The engine that the options ask for and the run's cache; ended, cleared and committed afterwards.

    wanted: the indices of the images that are needed, all by default. path: the compute path to keep.
    """
    cache = job.open_cache()
    index = cache.index if cache is not None else None
    engine = _build_engine(job, index, wanted, job.plan(path))
    try:
        yield engine, cache
    finally:
        progress.clear()
        engine.close()


def _build_engine(job: Job, index: KeyIndex | None, wanted: np.ndarray | None, plan: WorkPlan) -> Engine:
    options = job.options
    address = options.address or cluster_address()
    kind = options.engine if options.engine != "auto" else _choose_engine(job, index, wanted, address)
    if kind == "ray":
        from batchverify.engine.ray.engine import RayEngine

        return RayEngine(plan, index, address=address, num_cpus=options.num_cpus, verbose=options.verbose)
    cpus = options.num_cpus or available_cpus()
    return LocalEngine(plan, index, Workers.for_cpus(cpus, visible_gpus(plan.device)))


def cluster_address() -> str | None:
    """The cluster that the environment names: `$RAY_ADDRESS`, or the one that runs this process as its job."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if os.environ.get("RAY_JOB_ID") else None)


def _choose_engine(job: Job, index: KeyIndex | None, wanted: np.ndarray | None, address: str | None) -> str:
    """Ray where a cluster is named or enough images are not in the cache, by a sample of them."""
    if address is not None:
        return "ray"
    references = job.scan.images
    count = len(references) if wanted is None else len(wanted)
    if count <= RAY_WORTH_IMAGES:
        return "local"
    places = range(0, count, max(1, count // SAMPLE))
    sample = [references[at if wanted is None else int(wanted[at])] for at in places]
    readable = [each for each in sample if isinstance(each, str)]
    missing = _missing_share(job.plan().load, index, readable) * len(readable) / len(sample)
    return "ray" if missing * count > RAY_WORTH_IMAGES else "local"


def _missing_share(plan: LoadPlan, index: KeyIndex | None, sample: Sequence[str]) -> float:
    if index is None:
        return 1.0
    with ThreadPoolExecutor(16) as pool:
        data = list(pool.map(lambda name: read_image(name, plan.limits), sample))
    keys = [Loader.key(each) for each in data if not isinstance(each, Skipped)]
    return float((index.find(keys) < 0).sum()) / max(len(sample), 1)
