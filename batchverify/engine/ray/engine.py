"""The stages on Ray: load tasks feed actors that embed and score, on every node of a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from batchverify.cache.embedding_cache import KeyIndex
from batchverify.engine.base import Job, NodeLostError, WorkerLostError, Workers, WorkPlan, limit_threads
from batchverify.engine.ray.cluster import (
    Crew,
    Member,
    Node,
    Share,
    alive_nodes,
    first_nodes,
    node_lives,
    on_node,
    start_ray,
    uses_gpus,
)
from batchverify.engine.ray.shared_paths import SharedPaths
from batchverify.engine.stages import Embeddings, Image, Loaded, Loader, Scores, embed_images, score_indices
from batchverify.errors import BatchverifyError
from batchverify.process import keep_freed_memory
from batchverify.records import Skipped

# Images that lose so many nodes are suspects: in a container an image that takes all memory ends the node.
NODE_LOSSES = 2


def load_chunk(
    plan: WorkPlan, index: KeyIndex | None, references: Sequence[str]
) -> tuple[Loaded, list[Image]]:
    """The body of a load task."""
    from batchverify.faces.images import own_process

    own_process()
    return Loader(plan.load, index)(references)


class PairWorker:
    """The body of an actor: builds the embedder when first asked for it, then keeps it."""

    def __init__(self, plan: WorkPlan, threads: int, paths: SharedPaths | None = None) -> None:
        keep_freed_memory()
        self.plan, self._threads, self._paths = plan, threads, paths
        self._embedder: Any = None

    def ready(self) -> str:
        """Answers once the actor has its place: what keeps its node from taking part, or nothing."""
        return self._paths.problem_here() if self._paths is not None else ""

    def embed(
        self, images: list[Image], positions: Sequence[int], keys: Sequence[bytes]
    ) -> tuple[Embeddings, str]:
        """The entries of some images, and the compute path."""
        if self._embedder is None:
            self._embedder = self.plan.embedder(1, self._threads)
        chosen = [images[position] for position in positions]
        embeddings = embed_images(self._embedder, chosen, keys, self.plan.load.settings.view)
        return embeddings, self._embedder.compute_path

    def score(self, head: Any, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> Scores:
        """The scores of pairs of indices into `vectors`."""
        limit_threads(head, self._threads)
        return score_indices(head, vectors, a, b)


class RayEngine:
    """The stages on a Ray cluster, or on a Ray started here and ended with the engine.

    address: `None` starts one, else `auto` or `HOST:PORT`. A worker that dies costs the job it had
    (`WorkerLostError`, or `NodeLostError` when its node died, too); its actor is replaced. Nodes that join are
    used. Nothing is retried by Ray itself: the scheduler does.
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
        self._in_flight: dict[Any, Member] = {}
        # Where images were loaded, and what is known to have been on nodes that went.
        self._loaded_on: WeakKeyDictionary[Job, Node] = WeakKeyDictionary()
        self._what: WeakKeyDictionary[Job, Sequence[Any]] = WeakKeyDictionary()
        self._losses: Counter[Any] = Counter()
        self._loads: Counter[str] = Counter()
        self._paths: SharedPaths | None = None
        self._shared: tuple[Any, ...] = ()
        self._compute_paths: set[str] = set()
        self._ours = not ray.is_initialized()
        if self._ours:
            start_ray(address, num_cpus, verbose)
        # Zero CPUs: the actors hold them all, and the scheduler bounds how many loads are in flight.
        self._load_task: Any = ray.remote(num_cpus=0, max_retries=0, num_returns=2)(load_chunk)
        # An actor that died is replaced, not restarted: calls to one that is restarting fail like its own death.
        self._actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(PairWorker)
        self._crew = Crew(self._new_actor, use_gpus=False)
        try:
            nodes = first_nodes(plan.device, may_grow=address is not None or not self._ours)
            self._crew.use_gpus = uses_gpus(nodes, plan.device)
            self._plan_ref, self._index_ref = ray.put(plan), ray.put(index)
            self._crew.take(nodes)
        except BaseException:
            # Ctrl-C, too: nobody holds the engine yet who could close it.
            self.close()
            raise

    @property
    def workers(self) -> Workers:
        """The workers that are ready; those expected while none is."""
        return self._crew.workers()

    def require_shared(self, output: str | None, references: Sequence[str | Skipped]) -> None:
        """See `Engine`."""
        self._paths = SharedPaths.mark(self.plan.load.cache)
        nodes = list({node.id: node for node in (*alive_nodes(), *self._crew.nodes.values())}.values())
        self._paths.require(nodes, set(self._crew.nodes), output, references)

    def load(self, references: Sequence[str]) -> Job:
        """See `Engine`."""
        node = self._loading_node()
        # A task without needs would run beside the driver; here actors find their images on their own node.
        task = self._load_task.options(scheduling_strategy=on_node(node, soft=True))
        handle, images = task.remote(self._plan_ref, self._index_ref, references)
        job = Job(handle, images)
        self._loads[node.id] += 1
        self._loaded_on[job], self._what[job] = node, references
        return job

    def embed(self, loaded: Job, positions: Sequence[int], keys: Sequence[bytes]) -> Job:
        """See `Engine`."""
        member = self._crew.idlest(self._loaded_on.get(loaded))
        job = self._sent(member, member.actor.embed.remote(loaded.images, positions, keys))
        self._what[job] = keys
        return job

    def share(self, head: Any, vectors: np.ndarray) -> None:
        """See `Engine`: one copy in each node's object store, which all of its actors map."""
        self._shared = (self._ray.put(head), self._ray.put(vectors))

    def score(self, a: np.ndarray, b: np.ndarray) -> Job:
        """See `Engine`."""
        self._crew.refresh()
        member = self._crew.idlest()
        return self._sent(member, member.actor.score.remote(*self._shared, a, b))

    def wait(self, jobs: Iterable[Job], timeout: float) -> list[Job]:
        """See `Engine`."""
        self._crew.refresh()
        by_ref = {job.handle: job for job in jobs}
        done, _ = self._ray.wait(list(by_ref), num_returns=1, timeout=timeout, fetch_local=False)
        return [by_ref[ref] for ref in done]

    def result(self, job: Job) -> Any:
        """See `Engine`."""
        errors = self._ray.exceptions
        member = self._in_flight.pop(job.handle, None)
        if member is not None:
            member.jobs -= 1
        elif job in self._loaded_on:
            self._loads[self._loaded_on[job].id] -= 1
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
            raise self._lost(job, exc, node=self._node_died(job, member, exc)) from exc
        except errors.ObjectLostError as exc:
            raise self._lost(job, exc, node=True) from exc
        except errors.TaskCancelledError as exc:
            raise WorkerLostError(str(exc)) from exc
        except errors.RayTaskError as exc:
            if isinstance(exc.cause, errors.ObjectLostError):
                raise self._lost(job, exc.cause, node=True) from exc
            raise exc.cause if isinstance(exc.cause, BatchverifyError) else exc from None
        if isinstance(value, tuple) and isinstance(value[1], str):
            value, path = value
            self._compute_paths.add(path)
        return value

    def withdraw(self, job: Job) -> bool:
        """See `Engine`: an actor does not tell what it has begun."""
        return False

    def kill(self, job: Job, image: str) -> None:
        """See `Engine`."""
        if job.handle in self._in_flight:
            self._ray.kill(self._in_flight[job.handle].actor)
        else:
            self._ray.cancel(job.handle, force=True)

    def compute_path(self) -> str:
        """See `Engine`; several, where CPUs of several kinds worked."""
        return " + ".join(sorted(self._compute_paths))

    def close(self) -> None:
        """End the actors, and Ray itself where it was started here."""
        self._crew.close()
        if self._paths is not None:
            self._paths.close()
        if self._ours:
            self._ray.shutdown()

    def _new_actor(self, node: Node, share: Share) -> Any:
        actor = self._actor_class.options(
            num_cpus=share.workers.threads, num_gpus=share.gpu, scheduling_strategy=on_node(node, soft=False)
        )
        return actor.remote(self.plan, share.workers.threads, self._paths)

    def _loading_node(self) -> Node:
        """The node whose actors have the fewest loads under way for them."""
        members = Counter(member.node.id for member in self._crew.members)
        ready = [node for node in self._crew.nodes.values() if members[node.id]]
        nodes = ready or list(self._crew.nodes.values()) or [self._crew.idlest().node]
        return min(nodes, key=lambda node: (self._loads[node.id] + 1) / max(1, members[node.id]))

    def _node_died(self, job: Job, member: Member | None, exc: Exception) -> bool:
        """Whether a job was lost with its node; replaces the actor or gives up the node."""
        if member is not None:
            return self._crew.lost(member)
        node = self._loaded_on.get(job)
        if isinstance(exc, self._ray.exceptions.NodeDiedError) or node is None:
            return True
        if node.id in self._crew.nodes and not node_lives(node):
            self._crew.drop(node)
        return node.id not in self._crew.nodes

    def _lost(self, job: Job, exc: Exception, *, node: bool) -> WorkerLostError:
        """The error for a lost job: its images are innocent of their node's death, the first few times."""
        what = self._what.get(job, ())
        if node:
            self._losses.update(what)
        blamed = not node or any(self._losses[each] > NODE_LOSSES for each in what)
        return WorkerLostError(str(exc)) if blamed else NodeLostError(str(exc))

    def _sent(self, member: Member, ref: Any) -> Job:
        self._in_flight[ref] = member
        member.jobs += 1
        return Job(ref)
