"""How the nodes of a cluster are divided into workers, how actors are replaced, and which addresses are refused."""

import os
import socket
from pathlib import Path

import pytest

from batchverify.engine.base import GPU_CHUNK, Workers
from batchverify.engine.ray.address import Address
from batchverify.engine.ray.cluster import (
    START_TRIES,
    ActorPool,
    Node,
    Share,
    alive_nodes,
    cluster_workers,
    first_nodes,
    uses_gpus,
)
from batchverify.errors import BatchverifyError, UsageError

pytestmark = pytest.mark.ray


def node(cpus: int, gpus: int = 0, port: int = 1) -> Node:
    return Node(f"{cpus}-{gpus}", "127.0.0.1", port, cpus, gpus)


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"),
    [
        (2, 0, Share(Workers(2, 1, 2))),
        (64, 0, Share(Workers(8, 8, 16))),
        (4, 1, Share(Workers(2, 2, 2, GPU_CHUNK), 0.5)),
        (3, 1, Share(Workers(1, 3, 2, GPU_CHUNK), 1)),
        (16, 1, Share(Workers(4, 4, 12, GPU_CHUNK), 0.25)),
        (16, 2, Share(Workers(8, 2, 8, GPU_CHUNK), 0.25)),
        (8, 4, Share(Workers(4, 2, 4, GPU_CHUNK), 1)),
        (4, 8, Share(Workers(4, 1, 4, GPU_CHUNK), 1)),
        (0, 0, None),
    ],
)
def test_a_node_is_divided_so_that_all_its_workers_can_be_placed(cpus, gpus, expected):
    share = node(cpus, gpus).share(use_gpus=gpus > 0)
    assert share == expected
    if share is not None:
        assert share.workers.count * share.workers.threads <= cpus
        assert share.workers.count * share.gpu <= gpus


def test_a_run_on_gpus_leaves_nodes_without_one_alone():
    nodes = [node(16, 2), node(8), node(0, 1)]
    assert uses_gpus(nodes, "auto")
    assert not uses_gpus(nodes, "cpu")
    assert not uses_gpus(nodes[1:], "auto")
    assert cluster_workers(nodes, use_gpus=True) == Workers(8, 2, 8, GPU_CHUNK)
    assert cluster_workers(nodes, use_gpus=False) == Workers(16, 2, 24)


def test_nodes_of_two_sizes_are_both_used():
    assert cluster_workers([node(64), node(4)], use_gpus=False) == Workers(12, 8, 20)


def test_a_cluster_without_cpus_is_an_error():
    with pytest.raises(BatchverifyError, match="no node with a free CPU"):
        cluster_workers([node(0), node(0, 1)], use_gpus=False)


def test_a_node_answers_while_its_port_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert node(1, port=port).answers()
    assert not node(1, port=port).answers()


def test_gpus_of_a_machine_alone_that_has_none_are_not_waited_for():
    def alive() -> list[Node]:
        return [node(8)]

    with pytest.raises(UsageError, match=r"no node of the Ray cluster has a GPU and a CPU for workers \(1 nodes"):
        first_nodes("cuda", may_grow=False, alive=alive)
    assert first_nodes("auto", may_grow=False, alive=alive) == [node(8)]


def test_under_ray_no_gpu_is_chosen_by_number():
    with pytest.raises(UsageError, match="--device cuda:1: under Ray every worker is given a GPU"):
        first_nodes("cuda:1", may_grow=True)


def stillborn() -> type:
    """An actor's class that Ray ships by value: its workers cannot import a test."""

    class Stillborn:
        """Dies with its process while it starts, as long as `deaths` has fewer lines than `count`."""

        def __init__(self, deaths: Path, count: int) -> None:
            with deaths.open("a+") as file:
                file.seek(0)
                if len(file.readlines()) < count:
                    file.write("died\n")
                    file.flush()
                    os._exit(1)

        def ready(self) -> str:
            """Nothing keeps its node from taking part."""
            return ""

    return Stillborn


def test_a_ray_that_runs_answers(running_ray):
    Address(running_ray.get_runtime_context().gcs_address).require_answer()


@pytest.fixture
def pool_of(running_ray, tmp_path):
    pools = []

    def build(count: int) -> ActorPool:
        actors = running_ray.remote(num_cpus=0, max_restarts=0)(stillborn())

        def start(*_: object):
            return actors.remote(tmp_path / "deaths", count)

        pools.append(ActorPool(start, use_gpus=False))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def test_a_worker_that_dies_while_it_starts_is_replaced(pool_of, tmp_path, caplog):
    pool = pool_of(START_TRIES - 1)
    pool.take(alive_nodes())
    actor = pool.idlest()
    assert pool.actors == [actor]
    assert len((tmp_path / "deaths").read_text().splitlines()) == START_TRIES - 1
    assert "died during its start, another one is started" in caplog.text


def test_workers_that_never_start_end_the_run(pool_of):
    pool = pool_of(START_TRIES)
    pool.take(alive_nodes())
    with pytest.raises(BatchverifyError, match="a Ray worker could not be started, 3 times in a row: "):
        pool.idlest()


def test_a_local_ray_without_its_node_has_ended(caplog):
    """Ray ends the process some seconds later: the sentence comes before."""
    lone = node(4)
    pool = ActorPool(lambda *_: None, use_gpus=False, is_local=True, nodes={lone.id: lone})
    with pytest.raises(BatchverifyError, match="the local Ray ended in the middle of the run: "):
        pool.drop(lone)
    of_many = ActorPool(lambda *_: None, use_gpus=False, nodes={lone.id: lone})
    of_many.drop(lone)
    assert not of_many.nodes and "is gone: its tasks are repeated" in caplog.text
