"""The actors of a run on the nodes of a Ray cluster: as many as fit each node, while nodes come and go."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from batchverify.cluster import Node, Share, alive_nodes, cluster_workers, node_lives
from batchverify.engine import Workers
from batchverify.errors import BatchverifyError

log = logging.getLogger(__name__)

# Silence for this long while no worker has a place is reported.
PLACING_SECONDS = 60.0
# How often the list of nodes is looked at.
REFRESH_SECONDS = 5.0
# Workers of a node that die one after the other while they start; more, and something is wrong with it.
START_TRIES = 3


@dataclass(eq=False)
class Member:
    """An actor and its node. jobs: how many it has."""

    actor: Any
    node: Node
    jobs: int = 0


@dataclass
class Crew:
    """The actors of a run, by node. `start` makes one actor on a node.

    An actor counts once it has answered: no job is given to one that waits for its place, so none is blamed.
    """

    start: Callable[[Node, Share], Any]
    use_gpus: bool
    members: list[Member] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    _pending: dict[Any, Member] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _failed_starts: Counter[str] = field(default_factory=Counter)
    _next_look: float = 0.0

    def workers(self) -> Workers:
        """What is ready for work; what is expected while nothing is."""
        if not self.nodes:
            return Workers(1, 1, 1)
        planned = cluster_workers(list(self.nodes.values()), use_gpus=self.use_gpus)
        return replace(planned, count=len(self.members) or planned.count)

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

    def idlest(self, near: Node | None = None) -> Member:
        """The ready actor with the fewest jobs, of equals one on node `near`; waits, and says so, for one."""
        said = time.monotonic()
        while not self.members:
            self._admit(timeout=1)
            self.refresh()
            if not self.members and time.monotonic() - said > PLACING_SECONDS:
                said = time.monotonic()
                log.warning(
                    "waiting for the cluster to place workers (%d nodes, %d workers asked for); "
                    "are others holding it?",
                    len(self.nodes),
                    len(self._pending),
                )
        return min(self.members, key=lambda each: (each.jobs, each.node != near))

    def lost(self, member: Member) -> bool:
        """An actor died: it is replaced, or, when its node died, all of the node's are given up; whether so."""
        import ray

        if member not in self.members:
            return member.node.id not in self.nodes
        if not node_lives(member.node):
            self.drop(member.node)
            return True
        ray.kill(member.actor)
        self.members.remove(member)
        self._replace(member)
        return False

    def drop(self, node: Node) -> None:
        """Give up a node that is gone."""
        if self.nodes.pop(node.id, None) is not None:
            log.warning("node %s is gone: what it was doing is done again", node)
        self.members = [each for each in self.members if each.node != node]
        self._pending = {ref: each for ref, each in self._pending.items() if each.node != node}

    def close(self) -> None:
        """End all actors."""
        import ray

        for each in (*self.members, *self._pending.values()):
            ray.kill(each.actor)
        self.members, self._pending = [], {}

    def _replace(self, member: Member) -> None:
        share = member.node.share(use_gpus=self.use_gpus)
        if share is not None:
            self._start_one(member.node, share)

    def _start_one(self, node: Node, share: Share) -> None:
        actor = self.start(node, share)
        self._pending[actor.ready.remote()] = Member(actor, node)

    def _admit(self, timeout: float) -> None:
        """Take in the actors that have answered."""
        import ray

        if not self._pending:
            time.sleep(timeout)
            return
        count = 1 if timeout else len(self._pending)
        answered, _ = ray.wait(list(self._pending), num_returns=count, timeout=timeout)
        for ref in answered:
            member = self._pending.pop(ref, None)
            if member is None:
                continue
            try:
                problem = ray.get(ref)
            except ray.exceptions.RayError as exc:
                self._failed_start(member, exc)
                continue
            if problem:
                log.warning("node %s takes no part: %s", member.node, problem)
                self.drop(member.node)
            else:
                self.members.append(member)
                self._failed_starts.pop(member.node.id, None)

    def _failed_start(self, member: Member, exc: Exception) -> None:
        """An actor died before it answered: try again, unless its node died or nothing starts there."""
        if not node_lives(member.node):
            self.drop(member.node)
            return
        self._failed_starts[member.node.id] += 1
        first = str(exc).splitlines()[0]
        if self._failed_starts[member.node.id] >= START_TRIES:
            raise BatchverifyError(
                f"a Ray worker could not be started, {START_TRIES} times in a row: {first}"
            ) from exc
        log.warning("a worker of node %s died while it started, another is tried: %s", member.node, first)
        self._replace(member)
