"""The engine on Ray: tasks load images, actors embed and score them, on every node of a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from batchverify.cache.embedding_cache import KeyIndex
from batchverify.engine.base import NodeLostError, Task, WorkerLostError, Workers, WorkPlan, limit_threads
from batchverify.engine.ray.address import Address
from batchverify.engine.ray.cluster import (
    PLACING_SECONDS,
    ActorPool,
    Node,
    PooledActor,
    Share,
    alive_nodes,
    first_nodes,
    node_lives,
    on_node,
    uses_gpus,
)
from batchverify.engine.ray.shared_paths import SharedPaths
from batchverify.engine.ray.start import require_running, start_ray
from batchverify.engine.stages import (
    EmbeddedChunk,
    LoadedChunk,
    LoadedImage,
    Loader,
    PairScores,
    embed_images,
    score_indices,
)
from batchverify.errors import BatchverifyError, first_line
from batchverify.process import keep_freed_memory
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath

# An image that loses more nodes is suspected of killing them: in a container, running out of memory ends the node.
NODE_LOSSES = 2


def load_chunk(
    plan: WorkPlan, index: KeyIndex | None, image_paths: Sequence[str]
) -> tuple[LoadedChunk, list[LoadedImage]]:
    """The body of a load task."""
    from batchverify.faces.images import own_process

    own_process()
    return Loader(plan.load, index)(image_paths)


class PairWorker:
    """The body of an actor. It builds the embedder for the first images and keeps it."""

    def __init__(self, plan: WorkPlan, threads: int, paths: SharedPaths | None = None) -> None:
        keep_freed_memory()
        self.plan, self._threads, self._paths = plan, threads, paths
        self._embedder: Any = None

    def ready(self) -> str:
        """Answer once the actor runs: why its node cannot be used, empty if it can."""
        return self._paths.problem_here() if self._paths is not None else ""

    def embed(self, images: list[LoadedImage], positions: Sequence[int], keys: Sequence[bytes]) -> EmbeddedChunk:
        """Embed the images at `positions`."""
        if self._embedder is None:
            self._embedder = self.plan.embedder(1, self._threads)
        chosen = [images[position] for position in positions]
        return embed_images(self._embedder, chosen, keys, self.plan.load.settings.view)

    def score(self, head: Any, vectors: Any, a: np.ndarray, b: np.ndarray) -> PairScores:
        """Score pairs of indices into `vectors`."""
        limit_threads(head, self._threads)
        return score_indices(head, vectors, a, b)


class RayEngine:
    """Runs the stages on a Ray cluster, or on a local Ray that ends with the engine.

    address: of a cluster, None to start a local Ray. placing_seconds: see `ActorPool`.

    If a worker dies, its task fails with `WorkerLostError`, or with `NodeLostError` if its node died too, and its
    actor is replaced. Nodes that join are used. Ray itself retries nothing; the scheduler does.
    """

    name = "ray"

    def __init__(
        self,
        plan: WorkPlan,
        index: KeyIndex | None,
        *,
        address: Address | None = None,
        num_cpus: int | None = None,
        verbose: bool = False,
        placing_seconds: float = PLACING_SECONDS,
    ) -> None:
        import ray

        self._ray = ray
        self.plan = plan
        self._in_flight: dict[Any, PooledActor] = {}
        # The node of each load task, and the number of load tasks of each node.
        self._loaded_on: WeakKeyDictionary[Task, Node] = WeakKeyDictionary()
        self._loads: Counter[str] = Counter()
        # The image paths or keys of each task, and how often each of these was lost with a node.
        self._contents: WeakKeyDictionary[Task, Sequence[Any]] = WeakKeyDictionary()
        self._losses: Counter[Any] = Counter()
        self._paths: SharedPaths | None = None
        self._shared: tuple[Any, ...] = ()
        self._compute_paths: set[ComputePath] = set()
        self._ours = not ray.is_initialized()
        if self._ours:
            start_ray(address, num_cpus, verbose)
        else:
            require_running()
        # No CPUs are reserved: the actors have them all, and the scheduler bounds the number of load tasks.
        self._load_task: Any = ray.remote(num_cpus=0, max_retries=0, num_returns=2)(load_chunk)
        # A dead actor is replaced, not restarted: calls during a restart would fail like another death.
        self._actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(PairWorker)
        is_local = self._ours and address is None
        self._pool = ActorPool(self._new_actor, use_gpus=False, placing_seconds=placing_seconds, is_local=is_local)
        try:
            nodes = first_nodes(plan.device, may_grow=not is_local)
            self._pool.use_gpus = uses_gpus(nodes, plan.device)
            self._plan_ref, self._index_ref = ray.put(plan), ray.put(index)
            self._pool.take(nodes)
        except BaseException:
            # Also after Ctrl-C: the caller has no engine to close yet.
            self.close()
            raise

    @property
    def workers(self) -> Workers:
        """See `Engine`; those that are expected while none is ready."""
        return self._pool.workers()

    def require_shared(self, output: str | None, image_paths: Sequence[str | Skipped]) -> None:
        """See `Engine`."""
        self._paths = SharedPaths.mark(self.plan.load.cache)
        nodes = list({node.id: node for node in (*alive_nodes(), *self._pool.nodes.values())}.values())
        self._paths.require(nodes, set(self._pool.nodes), output, image_paths)

    def load(self, image_paths: Sequence[str]) -> Task:
        """See `Engine`."""
        node = self._loading_node()
        # Images are loaded on the node of the actor that will embed them, not beside the driver.
        load_task = self._load_task.options(scheduling_strategy=on_node(node, soft=True))
        handle, images = load_task.remote(self._plan_ref, self._index_ref, image_paths)
        task = Task(handle, images)
        self._loads[node.id] += 1
        self._loaded_on[task], self._contents[task] = node, image_paths
        return task

    def embed(self, loaded: Task, positions: Sequence[int], keys: Sequence[bytes]) -> Task:
        """See `Engine`."""
        actor = self._pool.idlest(self._loaded_on.get(loaded))
        task = self._track(actor, actor.handle.embed.remote(loaded.images, positions, keys))
        self._contents[task] = keys
        return task

    def share(self, head: Any, vectors: Any) -> None:
        """See `Engine`; each node has one copy in its object store, which its actors map into memory."""
        self._shared = (self._ray.put(head), self._ray.put(vectors))

    def score(self, a: np.ndarray, b: np.ndarray) -> Task:
        """See `Engine`."""
        self._pool.refresh()
        actor = self._pool.idlest()
        return self._track(actor, actor.handle.score.remote(*self._shared, a, b))

    def wait(self, tasks: Iterable[Task], timeout: float) -> list[Task]:
        """See `Engine`."""
        self._pool.refresh()
        by_ref = {task.handle: task for task in tasks}
        done, _ = self._ray.wait(list(by_ref), num_returns=1, timeout=timeout, fetch_local=False)
        return [by_ref[ref] for ref in done]

    def result(self, task: Task) -> Any:
        """See `Engine`."""
        errors = self._ray.exceptions
        actor = self._in_flight.pop(task.handle, None)
        if actor is not None:
            actor.tasks -= 1
        elif task in self._loaded_on:
            self._loads[self._loaded_on[task].id] -= 1
        try:
            value = self._ray.get(task.handle)
        except (errors.TaskUnschedulableError, errors.ActorUnschedulableError) as exc:
            raise BatchverifyError(f"the cluster cannot place a task: {first_line(exc)}") from exc
        except (
            errors.WorkerCrashedError,
            errors.RayActorError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
        ) as exc:
            raise self._lost(task, exc, node=self._node_died(task, actor, exc)) from exc
        except errors.ObjectLostError as exc:
            raise self._lost(task, exc, node=True) from exc
        except errors.TaskCancelledError as exc:
            raise WorkerLostError(str(exc)) from exc
        except errors.RayTaskError as exc:
            if isinstance(exc.cause, errors.ObjectLostError):
                raise self._lost(task, exc.cause, node=True) from exc
            raise exc.cause if isinstance(exc.cause, BatchverifyError) else exc from None
        if isinstance(value, EmbeddedChunk):
            self._compute_paths.add(value.compute_path)
        return value

    def withdraw(self, task: Task) -> bool:
        """See `Engine`; an actor does not tell which tasks it has started."""
        return False

    def kill(self, task: Task, work: str) -> None:
        """See `Engine`."""
        if task.handle in self._in_flight:
            self._ray.kill(self._in_flight[task.handle].handle)
        else:
            self._ray.cancel(task.handle, force=True)

    def compute_paths(self) -> set[ComputePath]:
        """See `Engine`."""
        return self._compute_paths

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        self._pool.close()
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
        """The node that has the fewest load tasks per actor."""
        actors = Counter(actor.node.id for actor in self._pool.actors)
        ready = [node for node in self._pool.nodes.values() if actors[node.id]]
        nodes = ready or list(self._pool.nodes.values()) or [self._pool.idlest().node]
        return min(nodes, key=lambda node: (self._loads[node.id] + 1) / max(1, actors[node.id]))

    def _node_died(self, task: Task, actor: PooledActor | None, exc: Exception) -> bool:
        """Whether a task was lost with its node; replaces the actor or drops the node."""
        if actor is not None:
            return self._pool.lost(actor)
        node = self._loaded_on.get(task)
        if isinstance(exc, self._ray.exceptions.NodeDiedError) or node is None:
            return True
        if node.id in self._pool.nodes and not node_lives(node):
            self._pool.drop(node)
        return node.id not in self._pool.nodes

    def _lost(self, task: Task, exc: Exception, *, node: bool) -> WorkerLostError:
        """The error for a lost task. node: its node died, for which images are not blamed the first few times."""
        contents = self._contents.get(task, ())
        if node:
            self._losses.update(contents)
        blamed = not node or any(self._losses[image] > NODE_LOSSES for image in contents)
        return WorkerLostError(str(exc)) if blamed else NodeLostError(str(exc))

    def _track(self, actor: PooledActor, ref: Any) -> Task:
        self._in_flight[ref] = actor
        actor.tasks += 1
        return Task(ref)
