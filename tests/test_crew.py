"""Workers that die while they start: another one is tried, up to a number in a row."""

import os
from pathlib import Path

import pytest

from batchverify.cluster import Node, Share, alive_nodes, start_ray
from batchverify.crew import START_TRIES, Crew
from batchverify.errors import BatchverifyError

pytestmark = pytest.mark.ray


def stillborn() -> type:
    """An actor's class that Ray sends as it is: its workers cannot import a test."""

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


@pytest.fixture(scope="module")
def ray():
    import ray

    start_ray(None, 1, verbose=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def crew_of(ray, tmp_path):
    crews = []

    def build(count: int) -> Crew:
        actors = ray.remote(num_cpus=0, max_restarts=0)(stillborn())

        def start(node: Node, share: Share):
            return actors.remote(tmp_path / "deaths", count)

        crews.append(Crew(start, use_gpus=False))
        return crews[-1]

    yield build
    for crew in crews:
        crew.close()


def test_a_worker_that_dies_while_it_starts_is_replaced(crew_of, tmp_path, caplog):
    crew = crew_of(START_TRIES - 1)
    crew.take(alive_nodes())
    member = crew.idlest()
    assert crew.members == [member]
    assert len((tmp_path / "deaths").read_text().splitlines()) == START_TRIES - 1
    assert "died while it started, another is tried" in caplog.text


def test_workers_that_never_start_end_the_run(crew_of):
    crew = crew_of(START_TRIES)
    crew.take(alive_nodes())
    with pytest.raises(BatchverifyError, match="a Ray worker could not be started, 3 times in a row: "):
        crew.idlest()
