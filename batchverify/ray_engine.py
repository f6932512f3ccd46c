"""The stages on Ray: load tasks feed actors that embed and score. The only user of Ray beside `submit`."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from batchverify.cache import KeyIndex
from batchverify.engine import MOST_WORKERS, Job, WorkerLostError, Workers, WorkPlan, available_cpus
from batchverify.errors import BatchverifyError, UsageError
from batchverify.memory import keep_freed_memory
from batchverify.pipeline import Embeddings, Image, Loaded, Loader, embed_images

log = logging.getLogger(__name__)

# Silence for this long while no worker has a place is reported.
PLACING_SECONDS = 60.0


def load_chunk(
    plan: WorkPlan, index: KeyIndex | None, references: Sequence[str]
) -> tuple[Loaded, list[Image]]:
    """The body of a load task."""
    from batchverify.decoding import own_process

    own_process()
    return Loader(plan.load, index)(references)


class PairWorker:
    """The body of an actor: builds the embedder when first asked for it, then keeps it."""

    def __init__(self, plan: WorkPlan, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        keep_freed_memory()
        self.plan = plan
        self._embedder: Any = None

    def ready(self) -> bool:
        """Answers once the actor has its place in the cluster."""
        return True

    def embed(
        self, images: list[Image], positions: Sequence[int], keys: Sequence[bytes]
    ) -> tuple[Embeddings, str]:
        """The entries of some images, and the compute path."""
        if self._embedder is None:
            self._embedder = self.plan.embedder()
        chosen = [images[position] for position in positions]
        embeddings = embed_images(self._embedder, chosen, keys, self.plan.load.settings.view)
        return embeddings, self._embedder.compute_path

    def score(
        self, head: Any, vectors: np.ndarray, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(probability, similarity) of pairs of indices into `vectors`."""
        scores: tuple[np.ndarray, np.ndarray] = head(vectors[a], vectors[b])
        return scores


class RayEngine:
    """The stages on a Ray cluster, or on a Ray started here and ended with the engine.

    address: `None` starts one, else `auto` or `HOST:PORT`. A worker that dies costs the job it had
    (`WorkerLostError`); its actor is replaced. Nothing is retried by Ray itself: the scheduler does.
    """

    name = "ray"

    def __init__(
        self,
        plan: WorkPlan,
        index: KeyIndex | None,
        *,
        address: str | None = None,
        num_cpus: int | None = None,
        verbose: bool = False,
    ) -> None:
        import ray

        self._ray = ray
        self.plan = plan
        self._actors: list[Any] = []
        # Actors without a place yet, by their answer to `ready`: no job is given to them, so none is blamed.
        self._pending: dict[Any, Any] = {}
        self._in_flight: dict[Any, Any] = {}
        self._shared: tuple[Any, ...] = ()
        self._compute_path = ""
        self._ours = not ray.is_initialized()
        if self._ours:
            start_ray(address, num_cpus, verbose)
        try:
            self._build(index)
        except BaseException:
            # Ctrl-C, too: nobody holds the engine yet who could close it.
            self.close()
            raise

    def _build(self, index: KeyIndex | None) -> None:
        ray = self._ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.workers = cluster_workers(nodes, use_gpus=self.plan.device != "cpu")
        gpus = 1 if self.plan.device != "cpu" and any(node.get("GPU") for node in nodes) else 0
        # Zero CPUs: the actors hold them all, and the scheduler bounds how many loads are in flight.
        self._load_task: Any = ray.remote(num_cpus=0, max_retries=0, num_returns=2)(load_chunk)
        # An actor that died is replaced, not restarted: calls to one that is restarting fail like its own death.
        self._actor_class = ray.remote(
            num_cpus=self.workers.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )(PairWorker)
        for _ in range(self.workers.count):
            self._new_actor()
        self._plan_ref, self._index_ref = ray.put(self.plan), ray.put(index)

    def load(self, references: Sequence[str]) -> Job:
        """See `Engine`."""
        handle, images = self._load_task.remote(self._plan_ref, self._index_ref, references)
        return Job(handle, images)

    def embed(self, loaded: Job, positions: Sequence[int], keys: Sequence[bytes]) -> Job:
        """See `Engine`."""
        actor = self._idlest()
        return self._sent(actor, actor.embed.remote(loaded.images, positions, keys))

    def share(self, head: Any, vectors: np.ndarray) -> None:
        """See `Engine`."""
        self._shared = (self._ray.put(head), self._ray.put(vectors))

    def score(self, a: np.ndarray, b: np.ndarray) -> Job:
        """See `Engine`."""
        actor = self._idlest()
        return self._sent(actor, actor.score.remote(*self._shared, a, b))

    def wait(self, jobs: Iterable[Job], timeout: float) -> list[Job]:
        """See `Engine`."""
        by_ref = {job.handle: job for job in jobs}
        done, _ = self._ray.wait(list(by_ref), num_returns=1, timeout=timeout, fetch_local=False)
        return [by_ref[ref] for ref in done]

    def result(self, job: Job) -> Any:
        """See `Engine`."""
        errors = self._ray.exceptions
        actor = self._in_flight.pop(job.handle, None)
        try:
            value = self._ray.get(job.handle)
        except (errors.TaskUnschedulableError, errors.ActorUnschedulableError) as exc:
            raise BatchverifyError(f"the cluster has no place for a job: {str(exc).splitlines()[0]}") from exc
        except (
            errors.WorkerCrashedError,
            errors.RayActorError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
        ) as exc:
            self._replace(actor)
            raise WorkerLostError(str(exc)) from exc
        except (errors.ObjectLostError, errors.TaskCancelledError) as exc:
            raise WorkerLostError(str(exc)) from exc
        except errors.RayTaskError as exc:
            raise exc.cause if isinstance(exc.cause, BatchverifyError) else exc from None
        if isinstance(value, tuple) and isinstance(value[1], str):
            value, self._compute_path = value
        return value

    def withdraw(self, job: Job) -> bool:
        """See `Engine`: an actor does not tell what it has begun."""
        return False

    def kill(self, job: Job, image: str) -> None:
        """See `Engine`."""
        if job.handle in self._in_flight:
            self._ray.kill(self._in_flight[job.handle])
        else:
            self._ray.cancel(job.handle, force=True)

    def compute_path(self) -> str:
        """See `Engine`."""
        return self._compute_path

    def close(self) -> None:
        """End the actors, and Ray itself where it was started here."""
        for actor in (*self._actors, *self._pending.values()):
            self._ray.kill(actor)
        self._actors, self._pending = [], {}
        if self._ours:
            self._ray.shutdown()

    def _new_actor(self) -> None:
        actor = self._actor_class.remote(self.plan, self.workers.threads)
        self._pending[actor.ready.remote()] = actor

    def _replace(self, actor: Any) -> None:
        """A fresh actor in the place of one that died, unless that has happened already."""
        if actor in self._actors:
            self._ray.kill(actor)
            self._actors.remove(actor)
            self._new_actor()

    def _idlest(self) -> Any:
        """The ready actor with the fewest jobs; waits, and says so, while there is none."""
        self._admit(timeout=0)
        while not self._actors:
            if not self._admit(timeout=PLACING_SECONDS):
                log.warning(
                    "waiting for the cluster to place workers of %d CPUs each; are others holding it?",
                    self.workers.threads,
                )
        busy = list(self._in_flight.values())
        return min(self._actors, key=busy.count)

    def _admit(self, timeout: float) -> bool:
        """Take in the actors that have answered; whether there were any."""
        if not self._pending:
            return False
        answered, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        for ref in answered:
            actor = self._pending.pop(ref)
            try:
                self._ray.get(ref)
            except self._ray.exceptions.RayError as exc:
                raise BatchverifyError(
                    f"a Ray worker could not be started: {str(exc).splitlines()[0]}"
                ) from exc
            self._actors.append(actor)
        return bool(answered)

    def _sent(self, actor: Any, ref: Any) -> Job:
        self._in_flight[ref] = actor
        return Job(ref)


def cluster_workers(nodes: Sequence[dict[str, float]], *, use_gpus: bool) -> Workers:
    """Workers that fit the nodes' resources: with GPUs one each, else as many as CPUs allow, all alike.

    Every worker finds a place on some node.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [
        min(int(node.get("GPU", 0)), cpu) if use_gpus else 0 for node, cpu in zip(nodes, cpus, strict=True)
    ]
    usable = [pair for pair in zip(cpus, gpus, strict=True) if pair[0] and (pair[1] or not any(gpus))]
    if not usable:
        raise BatchverifyError("the Ray cluster has no node with a free CPU to run workers on")

    def places(threads: int) -> int:
        return sum(min(gpu or MOST_WORKERS, cpu // threads) for cpu, gpu in usable)

    kinds = {Workers.for_cpus(cpu, gpu).threads for cpu, gpu in usable}
    # The number of threads that puts most CPUs to work; a node too small for it takes no part.
    threads = min(kinds) if any(gpus) else max(sorted(kinds), key=lambda each: each * places(each))
    total = places(threads)
    return Workers(total, threads, min(sum(cpu for cpu, _ in usable), 2 * total))


def start_ray(address: str | None, num_cpus: int | None, verbose: bool) -> None:
    """Join the cluster at `address`, or start a Ray here. Raises `UsageError` and `BatchverifyError`."""
    import ray

    if address and address.startswith("ray://"):
        raise UsageError(
            f"--address {address}: Ray Client breaks long jobs; run the command on the cluster itself, as a "
            "Ray job, or give the head node's HOST:PORT"
        )
    if not verbose:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "1")
        logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
        "configure_logging": True,
    }
    if address is None:
        # The machine is ours: workers at nice 15 would lose against everything else on it.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"address": "local", "num_cpus": num_cpus or available_cpus(), "include_dashboard": False}
    else:
        options["address"] = address
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if on_main_thread:
            # Ray puts its own in place, which ends the process without the end that we give a run.
            signal.signal(signal.SIGTERM, handler)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        hint = "; a cluster with token authentication wants RAY_AUTH_MODE=token set here" if address else ""
        raise BatchverifyError(
            f"Ray could not be started or reached ({address or 'local'}): {exc}{hint}"
        ) from exc
