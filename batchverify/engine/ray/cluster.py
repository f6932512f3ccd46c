"""A Ray cluster: how its nodes are divided into workers, and a pool of actors that replaces those that die."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from batchverify.engine.base import GPU_CHUNK, Workers, workers_per_gpu
from batchverify.errors import BatchverifyError, UsageError, first_line

log = logging.getLogger(__name__)

# How long a start waits for a first node with CPUs (GPUs): an autoscaled cluster may have to fetch its image.
NODE_SECONDS = 600.0
# Waiting for a node, or for Ray to place workers, is reported at these intervals.
SAY_SECONDS = 60.0
PLACING_SECONDS = 60.0
# The processes of a dying node do not all end at once.
GRACE_SECONDS = 0.3
ANSWER_SECONDS = 3.0
# How often the list of nodes is read.
REFRESH_SECONDS = 5.0
# A folder with less space counts as full: Ray asks for pieces of this size and more.
FULL_BYTES = 32 << 20
# If so many workers of a node die in a row while they start, the run ends.
START_TRIES = 3


@dataclass(frozen=True)
class Share:
    """The workers of a node. gpu: GPUs of each worker, perhaps a fraction."""

    workers: Workers
    gpu: float = 0.0


@dataclass(frozen=True)
class Node:
    """A node of the cluster. id: Ray's. address, port: of its raylet. cpus, gpus: how many Ray may use."""

    id: str
    address: str
    port: int
    cpus: int
    gpus: int

    def share(self, *, use_gpus: bool) -> Share | None:
        """The workers that fit on this node; None without a CPU, or without a GPU if GPUs are used."""
        if not self.cpus or (use_gpus and not self.gpus):
            return None
        if not use_gpus:
            return Share(Workers.for_cpus(self.cpus))
        per_gpu = workers_per_gpu(self.cpus, self.gpus)
        count = min(self.cpus, per_gpu * self.gpus)
        # The other CPUs decode: load tasks do not reserve any.
        workers = Workers(count, self.cpus // count, max(count, self.cpus - count), GPU_CHUNK)
        return Share(workers, 1 / per_gpu)

    def answers(self) -> bool:
        """Whether its raylet accepts connections: Ray takes up to a minute to notice that a machine is gone."""
        try:
            socket.create_connection((self.address, self.port), timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


def alive_nodes() -> list[Node]:
    """The nodes of the cluster, as far as Ray knows."""
    import ray

    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerPort"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def uses_gpus(nodes: Sequence[Node], device: str) -> bool:
    """Whether a run on these nodes uses GPUs. A run uses either GPUs or CPUs, so that it has one compute path."""
    return device != "cpu" and any(node.gpus and node.cpus for node in nodes)


def cluster_workers(nodes: Sequence[Node], *, use_gpus: bool) -> Workers:
    """The workers of all nodes together; `threads` is the largest number. Raises `BatchverifyError` for none."""
    shares = [share.workers for node in nodes if (share := node.share(use_gpus=use_gpus)) is not None]
    if not shares:
        raise BatchverifyError("the Ray cluster has no node with a free CPU to run workers on")
    return Workers(
        sum(workers.count for workers in shares),
        max(workers.threads for workers in shares),
        sum(workers.loaders for workers in shares),
        max(workers.chunk for workers in shares),
    )


def first_nodes(device: str, *, may_grow: bool, alive: Callable[[], list[Node]] = alive_nodes) -> list[Node]:
    """The nodes to start on. Waits for one that can work, because an autoscaled cluster may start without.

    may_grow: whether nodes may join. alive: gives the nodes there are. Raises `UsageError` if there is no such node.
    """
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: under Ray every worker is given a GPU; --device cuda")
    deadline = time.monotonic() + NODE_SECONDS * may_grow
    wants_gpus = device.startswith("cuda")
    reported = 0.0
    while True:
        nodes = alive()
        if any(node.share(use_gpus=wants_gpus) for node in nodes):
            return nodes
        what = "a GPU and a CPU" if wants_gpus else "a CPU"
        if time.monotonic() >= deadline:
            raise UsageError(f"no node of the Ray cluster has {what} for workers ({len(nodes)} nodes)")
        if time.monotonic() - reported > SAY_SECONDS:
            log.warning("waiting for a node with %s to join the cluster (%d nodes now)", what, len(nodes))
            reported = time.monotonic()
        time.sleep(1)


def node_lives(node: Node) -> bool:
    """Whether a node is still there a moment after one of its workers died."""
    time.sleep(GRACE_SECONDS)
    return node.answers()


def on_node(node: Node, *, soft: bool) -> Any:
    """Ray's strategy for a task or actor of one node. soft: another node may take it if that one is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=soft)


def _end_of_ray() -> str:
    """Why this machine's Ray may have ended, and what helps."""
    folder, helps = "/dev/shm", "free some space there, or use --engine local"  # noqa: S108  where Ray keeps objects
    with suppress(OSError):
        if shutil.disk_usage(folder).free < FULL_BYTES:
            return f"{folder}, where it keeps images and vectors, is full: {helps}"
    return "something killed it, as the system does for want of memory"


@dataclass(eq=False)
class PooledActor:
    """An actor and its node. share: the workers of that. tasks: how many it has been given and not finished."""

    handle: Any
    node: Node
    share: Share
    tasks: int = 0


@dataclass
class ActorPool:
    """The actors of a run.

    start: creates one actor on a node. placing_seconds: how often waiting for a place is reported. is_local: this
    machine's own Ray, whose node is all.
    An actor gets tasks only after it has answered once, so that no task is blamed for one that Ray cannot place.
    """

    start: Callable[[Node, Share], Any]
    use_gpus: bool
    placing_seconds: float = PLACING_SECONDS
    is_local: bool = False
    actors: list[PooledActor] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    _pending: dict[Any, PooledActor] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _failed_starts: Counter[str] = field(default_factory=Counter)
    _next_look: float = 0.0

    def workers(self) -> Workers:
        """The actors that are ready; while there are none, those that are expected."""
        if not self.nodes:
            return Workers(1, 1, 1)
        planned = cluster_workers(list(self.nodes.values()), use_gpus=self.use_gpus)
        return replace(planned, count=len(self.actors) or planned.count)

    def take(self, nodes: Iterable[Node]) -> list[Node]:
        """Start actors on the nodes that are new and can work; returns these nodes."""
        fresh = []
        for node in nodes:
            share = node.share(use_gpus=self.use_gpus)
            if node.id not in self._seen and share is not None:
                self._seen.add(node.id)
                self.nodes[node.id] = node
                fresh.append(node)
                for _ in range(share.workers.count):
                    self._start_one(node, share)
        return fresh

    def refresh(self) -> None:
        """Look every few seconds for nodes that joined or left, and admit the actors that have answered."""
        if time.monotonic() >= self._next_look:
            alive = alive_nodes()
            for node in self.take(alive):
                log.info("node %s joined", node)
            for node_id in self.nodes.keys() - {node.id for node in alive}:
                self.drop(self.nodes[node_id])
            self._next_look = time.monotonic() + REFRESH_SECONDS
        self._admit(timeout=0)

    def idlest(self, near: Node | None = None) -> PooledActor:
        """The ready actor with the fewest tasks, preferably on node `near`; waits while there is none."""
        reported = time.monotonic()
        while not self.actors:
            self._admit(timeout=1)
            self.refresh()
            if not self.actors and time.monotonic() - reported > self.placing_seconds:
                reported = time.monotonic()
                log.warning(
                    "waiting for the cluster to place workers (%d nodes, %d workers requested); "
                    "do other jobs use it?",
                    len(self.nodes),
                    len(self._pending),
                )
        return min(self.actors, key=lambda actor: (actor.tasks, actor.node != near))

    def lost(self, actor: PooledActor) -> bool:
        """Replace an actor that died, or drop its node if that died too; returns whether the node did."""
        import ray

        if actor not in self.actors:
            return actor.node.id not in self.nodes
        if not node_lives(actor.node):
            self.drop(actor.node)
            return True
        ray.kill(actor.handle)
        self.actors.remove(actor)
        self._start_one(actor.node, actor.share)
        return False

    def drop(self, node: Node) -> None:
        """Remove a node that is gone, with its actors. Raises `BatchverifyError` if it was all of a local Ray."""
        if self.is_local and node.id in self.nodes:
            # Ray ends this process some seconds later, without a word of ours.
            raise BatchverifyError(
                f"the local Ray ended in the middle of the run: {_end_of_ray()}; the same command goes on from what "
                "is done"
            )
        self._remove(node)

    def _remove(self, node: Node) -> None:
        if self.nodes.pop(node.id, None) is not None:
            log.warning("node %s is gone: its tasks are repeated", node)
        self.actors = [actor for actor in self.actors if actor.node != node]
        self._pending = {ref: actor for ref, actor in self._pending.items() if actor.node != node}

    def close(self) -> None:
        """End all actors."""
        import ray

        for actor in (*self.actors, *self._pending.values()):
            ray.kill(actor.handle)
        self.actors, self._pending = [], {}

    def _start_one(self, node: Node, share: Share) -> None:
        handle = self.start(node, share)
        self._pending[handle.ready.remote()] = PooledActor(handle, node, share)

    def _admit(self, timeout: float) -> None:
        """Let the pending actors that have answered take part."""
        import ray

        if not self._pending:
            time.sleep(timeout)
            return
        count = 1 if timeout else len(self._pending)
        answered, _ = ray.wait(list(self._pending), num_returns=count, timeout=timeout)
        for ref in answered:
            actor = self._pending.pop(ref, None)
            if actor is None:
                continue
            try:
                problem = ray.get(ref)
            except ray.exceptions.RayError as exc:
                self._failed_start(actor, exc)
                continue
            if problem:
                log.warning("node %s is not used: %s", actor.node, problem)
                self._remove(actor.node)
            else:
                self.actors.append(actor)
                self._failed_starts.pop(actor.node.id, None)

    def _failed_start(self, actor: PooledActor, exc: Exception) -> None:
        """An actor died before it answered: start another one, unless its node died or too many failed."""
        if not node_lives(actor.node):
            self.drop(actor.node)
            return
        self._failed_starts[actor.node.id] += 1
        reason = first_line(exc)
        if self._failed_starts[actor.node.id] >= START_TRIES:
            raise BatchverifyError(
                f"a Ray worker could not be started, {START_TRIES} times in a row: {reason}"
            ) from exc
        log.warning("a worker of node %s died during its start, another one is started: %s", actor.node, reason)
        self._start_one(actor.node, actor.share)
