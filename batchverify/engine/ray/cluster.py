"""A Ray cluster: its nodes cut into workers, and the actor pool that survives deaths."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batchverify.engine.base import GPU_CHUNK, Workers
from batchverify.errors import BatchverifyError, UsageError, first_line
from batchverify.runtime.devices import available_cpus

log = logging.getLogger(__name__)

# So long a start waits for a first node with CPUs (GPUs): an autoscaled cluster may have to fetch its image.
NODE_SECONDS = 600.0
SAY_SECONDS = 60.0
# The processes of a dying node end one after the other.
GRACE_SECONDS = 0.3
ANSWER_SECONDS = 3.0
# Workers take turns on a GPU while others are busy with Python, where each has so many CPUs.
MOST_PER_GPU = 4
CPUS_PER_GPU_WORKER = 2
# Silence for this long while no worker has a place is reported.
PLACING_SECONDS = 60.0
# How often the list of nodes is looked at.
REFRESH_SECONDS = 5.0
# Workers of a node that die one after the other while they start; more, and something is wrong with it.
START_TRIES = 3


@dataclass(frozen=True)
class Share:
    """How the workers of a node are cut. gpu: of each, perhaps a fraction."""

    workers: Workers
    gpu: float = 0.0


@dataclass(frozen=True)
class Node:
    """A node of the cluster. id: Ray's. address, port: of its raylet. cpus, gpus: those that Ray may use."""

    id: str
    address: str
    port: int
    cpus: int
    gpus: int

    def share(self, *, use_gpus: bool) -> Share | None:
        """The workers that fit here; None where there is no CPU, or no GPU although GPUs are used."""
        if not self.cpus or (use_gpus and not self.gpus):
            return None
        if not use_gpus:
            return Share(Workers.for_cpus(self.cpus))
        each = max(1, min(MOST_PER_GPU, self.cpus // (CPUS_PER_GPU_WORKER * self.gpus)))
        count = min(self.cpus, each * self.gpus)
        # What the workers leave decodes: Ray's loads ask for no CPU.
        return Share(Workers(count, self.cpus // count, max(count, self.cpus - count), GPU_CHUNK), 1 / each)

    def answers(self) -> bool:
        """Whether its raylet is there: Ray itself takes up to a minute to notice that a machine is gone."""
        try:
            socket.create_connection((self.address, self.port), timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined, as far as Ray knows."""
    import ray

    return [
        Node(
            each["NodeID"],
            each["NodeManagerAddress"],
            each["NodeManagerPort"],
            int(each["Resources"].get("CPU", 0)),
            int(each["Resources"].get("GPU", 0)),
        )
        for each in ray.nodes()
        if each["Alive"]
    ]


def uses_gpus(nodes: Sequence[Node], device: str) -> bool:
    """Whether a run on these nodes is one on GPUs: one compute path a run, no mixture."""
    return device != "cpu" and any(node.gpus and node.cpus for node in nodes)


def cluster_workers(nodes: Sequence[Node], *, use_gpus: bool) -> Workers:
    """The workers of all nodes together; `threads` are those of the largest. Raises `BatchverifyError` for none."""
    shares = [share.workers for node in nodes if (share := node.share(use_gpus=use_gpus)) is not None]
    if not shares:
        raise BatchverifyError("the Ray cluster has no node with a free CPU to run workers on")
    return Workers(
        sum(each.count for each in shares),
        max(each.threads for each in shares),
        sum(each.loaders for each in shares),
        max(each.chunk for each in shares),
    )


def first_nodes(device: str, *, may_grow: bool) -> list[Node]:
    """The nodes to start on, waiting for one that can work: an autoscaled cluster may begin with none.

    may_grow: whether others may join. Raises `UsageError` where there is none.
    """
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: under Ray every worker is given a GPU; --device cuda")
    deadline = time.monotonic() + NODE_SECONDS * may_grow
    wants_gpus = device.startswith("cuda")
    said = 0.0
    while True:
        nodes = alive_nodes()
        if any(node.share(use_gpus=wants_gpus) for node in nodes):
            return nodes
        what = "a GPU and a CPU" if wants_gpus else "a CPU"
        if time.monotonic() >= deadline:
            raise UsageError(f"no node of the Ray cluster has {what} for workers ({len(nodes)} nodes)")
        if time.monotonic() - said > SAY_SECONDS:
            log.warning("waiting for a node with %s to join the cluster (%d nodes now)", what, len(nodes))
            said = time.monotonic()
        time.sleep(1)


def node_lives(node: Node) -> bool:
    """Whether a node whose worker just died is still there a moment later."""
    time.sleep(GRACE_SECONDS)
    return node.answers()


def on_node(node: Node, *, soft: bool) -> Any:
    """Ray's strategy for a task or actor of one node. soft: elsewhere, when that node is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=soft)


def start_ray(address: str | None, num_cpus: int | None, verbose: bool) -> None:
    """Join the cluster at `address`, or start a Ray here. Raises `UsageError` and `BatchverifyError`."""
    import ray

    if address and address.startswith("ray://"):
        raise UsageError(
            f"--address {address}: Ray Client breaks long jobs; hand the command to the cluster instead: "
            "batchverify submit --address http://HEAD:8265 -- …"
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


@dataclass(eq=False)
class PooledActor:
    """An actor and its node. tasks: how many it has."""

    handle: Any
    node: Node
    tasks: int = 0


@dataclass
class ActorPool:
    """The actors of a run, by node. `start` makes one actor on a node.

    An actor counts once it has answered: no task is given to one that waits for its place, so none is blamed.
    """

    start: Callable[[Node, Share], Any]
    use_gpus: bool
    actors: list[PooledActor] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    _pending: dict[Any, PooledActor] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _failed_starts: Counter[str] = field(default_factory=Counter)
    _next_look: float = 0.0

    def workers(self) -> Workers:
        """What is ready for work; what is expected while nothing is."""
        if not self.nodes:
            return Workers(1, 1, 1)
        planned = cluster_workers(list(self.nodes.values()), use_gpus=self.use_gpus)
        return replace(planned, count=len(self.actors) or planned.count)

    def take(self, nodes: Iterable[Node]) -> list[Node]:
        """Start actors on those nodes that are new and can work; returns these."""
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
        """Look for nodes that joined or left, every few seconds, and take in actors that have answered."""
        if time.monotonic() >= self._next_look:
            alive = alive_nodes()
            for node in self.take(alive):
                log.info("node %s joined", node)
            for node in [each for each in self.nodes.values() if each.id not in {one.id for one in alive}]:
                self.drop(node)
            self._next_look = time.monotonic() + REFRESH_SECONDS
        self._admit(timeout=0)

    def idlest(self, near: Node | None = None) -> PooledActor:
        """The ready actor with the fewest tasks, of equals one on node `near`; waits, and says so, for one."""
        said = time.monotonic()
        while not self.actors:
            self._admit(timeout=1)
            self.refresh()
            if not self.actors and time.monotonic() - said > PLACING_SECONDS:
                said = time.monotonic()
                log.warning(
                    "waiting for the cluster to place workers (%d nodes, %d workers asked for); "
                    "are others holding it?",
                    len(self.nodes),
                    len(self._pending),
                )
        return min(self.actors, key=lambda each: (each.tasks, each.node != near))

    def lost(self, pooled: PooledActor) -> bool:
        """An actor died: it is replaced, or, when its node died, all of the node's are given up; whether so."""
        import ray

        if pooled not in self.actors:
            return pooled.node.id not in self.nodes
        if not node_lives(pooled.node):
            self.drop(pooled.node)
            return True
        ray.kill(pooled.handle)
        self.actors.remove(pooled)
        self._replace(pooled)
        return False

    def drop(self, node: Node) -> None:
        """Give up a node that is gone."""
        if self.nodes.pop(node.id, None) is not None:
            log.warning("node %s is gone: what it was doing is done again", node)
        self.actors = [each for each in self.actors if each.node != node]
        self._pending = {ref: each for ref, each in self._pending.items() if each.node != node}

    def close(self) -> None:
        """End all actors."""
        import ray

        for each in (*self.actors, *self._pending.values()):
            ray.kill(each.handle)
        self.actors, self._pending = [], {}

    def _replace(self, pooled: PooledActor) -> None:
        share = pooled.node.share(use_gpus=self.use_gpus)
        if share is not None:
            self._start_one(pooled.node, share)

    def _start_one(self, node: Node, share: Share) -> None:
        actor = self.start(node, share)
        self._pending[actor.ready.remote()] = PooledActor(actor, node)

    def _admit(self, timeout: float) -> None:
        """Take in the actors that have answered."""
        import ray

        if not self._pending:
            time.sleep(timeout)
            return
        count = 1 if timeout else len(self._pending)
        answered, _ = ray.wait(list(self._pending), num_returns=count, timeout=timeout)
        for ref in answered:
            pooled = self._pending.pop(ref, None)
            if pooled is None:
                continue
            try:
                problem = ray.get(ref)
            except ray.exceptions.RayError as exc:
                self._failed_start(pooled, exc)
                continue
            if problem:
                log.warning("node %s takes no part: %s", pooled.node, problem)
                self.drop(pooled.node)
            else:
                self.actors.append(pooled)
                self._failed_starts.pop(pooled.node.id, None)

    def _failed_start(self, pooled: PooledActor, exc: Exception) -> None:
        """An actor died before it answered: try again, unless its node died or nothing starts there."""
        if not node_lives(pooled.node):
            self.drop(pooled.node)
            return
        self._failed_starts[pooled.node.id] += 1
        first = first_line(exc)
        if self._failed_starts[pooled.node.id] >= START_TRIES:
            raise BatchverifyError(
                f"a Ray worker could not be started, {START_TRIES} times in a row: {first}"
            ) from exc
        log.warning("a worker of node %s died while it started, another is tried: %s", pooled.node, first)
        self._replace(pooled)
