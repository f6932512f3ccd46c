"""After real kills at random moments, the same command gives the rows of an undisturbed run; no work is repeated.

The kills of toys have four targets: the driver, at any moment of its run; the writer, which is the driver before an
I/O call that changes a file; workers of a local Ray; nodes of a cluster. The moments are drawn by seed, one from each
of as many equal slices of the run. After each kill the same command must leave the undisturbed bytes and nothing
temporary. `BATCHVERIFY_KILLS=200 python -m pytest --timeout 0 tests/scoring/test_kills.py` makes 200 of them.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pytest
from kill_bench import NAMES, KillBench
from kill_bench import check as check_place
from killing import Blow, ClusterJob, KilledJob, draw_pairs

IMAGES, PAIRS, PART = 120, 6000, 500
KILLS = int(os.environ.get("BATCHVERIFY_KILLS", "22"))
SHARES = {"driver": 0.36, "writer": 0.36, "worker": 0.18, "node": 0.1}
# Seconds that the toy takes for a chunk under Ray, and that pass after a part: kills fall between two.
TOY_SECONDS, PART_SECONDS = 0.2, 0.1


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return draw_pairs(tmp_path_factory.mktemp("noise"), IMAGES, PAIRS)


@pytest.fixture(scope="module")
def undisturbed(manifest, tmp_path_factory) -> pa.Table:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = KilledJob(manifest, folder / "out.parquet", folder / "cache", PART)
    job.finish()
    return pa.concat_tables(job.table())


def check(job: KilledJob, undisturbed: pa.Table) -> dict:
    summary = job.finish()
    assert pa.concat_tables(job.table()).equals(undisturbed)
    assert job.embedded_twice() == 0
    assert summary["rows"] == PAIRS and summary["failures"] == {"undecodable": 1, "not_found": 1}
    assert not job.out.with_name(job.out.name + ".job").exists()
    return summary


def test_the_driver_of_real_embeddings_is_interrupted_and_killed(manifest, undisturbed, tmp_path):
    generator = random.Random("folder")
    # The kill comes at most 0.05 s after a part; the next part takes at least 0.2 s.
    job = KilledJob(manifest, tmp_path / "folder", tmp_path / "cache", PART, pause=0.2)
    job.kill("Ctrl-C", generator.uniform(1.5, 4.0))
    assert job.kill("SIGKILL", generator.uniform(0, 0.05), wait_for="part")
    done = job.files("part")
    summary = check(job, undisturbed)
    assert summary["resumed_rows"] == done * PART > 0


def share(target: str) -> int:
    """How many of the kills a target gets."""
    return max(1, round(KILLS * SHARES[target]))


def test_the_kills_are_enough():
    assert sum(map(share, SHARES)) >= min(KILLS, 20)


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Print it into the report of CI."""
    with capsys.disabled():
        print(f"\n{text}")


def slices(target: str) -> Iterator[tuple[int, float, random.Random]]:
    """The number of each kill of a target and its place in the run, from 0 to 1; and dice."""
    dice = random.Random(target)
    for number in range(share(target)):
        yield number, (number + dice.random()) / share(target), dice


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[KillBench]:
    bench = KillBench(tmp_path_factory.mktemp("toys"))
    yield bench
    bench.server.close()


def test_the_driver_is_killed_at_any_moment(bench, capsys):
    before = bench.kills
    for number, at, dice in slices("driver"):
        name = NAMES[number % 2]
        place, moment = bench.place(), at * bench.expected[name].seconds
        # If the machine is faster now, the run may be over.
        while not bench.kill(place, name, moment):
            place, moment = bench.place(), moment * dice.random()
        if number % 3 == 2:
            bench.kill(place, name, moment * dice.random())
        bench.finish(place, name)
    assert bench.kills - before >= share("driver")
    tell(capsys, f"{bench.kills - before} kills of the driver, all resumed")


def test_the_writer_is_killed_before_any_change(bench, capsys):
    before = bench.kills
    for number, at, dice in slices("writer"):
        name = NAMES[number % 2]
        changes = bench.expected[name].changes
        call = changes[int(at * len(changes))]
        place = bench.place()
        # Threads do not make their calls in the same order every time.
        while not bench.kill_at(place, name, call):
            place, call = bench.place(), dice.choice(changes)
        if number % 3 == 2:
            bench.kill_at(place, name, dice.choice(changes))
        bench.finish(place, name)
    assert bench.kills - before >= share("writer")
    tell(capsys, f"{bench.kills - before} kills of the writer, all resumed")


def blows(dice: random.Random, *kinds: str) -> list[Blow]:
    """One after the other, each some moments after a new segment or part."""
    return [Blow(how, dice.uniform(0, 0.2), stage) for how, stage in map(str.split, kinds)]


@pytest.mark.ray
def test_workers_of_a_local_ray_are_killed(bench, capsys):
    dice, kills = random.Random("worker"), Counter()
    while kills["worker"] + kills["actor"] < share("worker"):
        place, name = bench.place(), dice.choice(NAMES)
        job = KilledJob(
            bench.manifest, place / "out" / name, place / "cache", PART,
            engine="ray", pause=PART_SECONDS, toy=TOY_SECONDS,
        )  # fmt: skip
        job.run(blows(dice, "actor segment", "worker segment", "SIGKILL segment"))
        # The second run goes on, and through to the end.
        job.run(blows(dice, "worker segment", "actor part"))
        kills.update(blow.how for blow in job.kills)
        check_place(place, name, bench.expected[name].content)
    tell(capsys, f"kills under Ray, all resumed: {dict(kills)}")


@pytest.mark.ray
def test_nodes_of_a_cluster_are_killed(bench, capsys):
    dice, kills = random.Random("node"), 0
    job = ClusterJob(bench.manifest, bench.folder, bench.folder, PART, pause=PART_SECONDS, toy=TOY_SECONDS)
    try:
        while kills < share("node"):
            place, name = bench.place(), dice.choice(NAMES)
            job.renew(place / "out" / name, place / "cache")
            kills += job.run(blows(dice, "node segment", "node part"))
            check_place(place, name, bench.expected[name].content)
    finally:
        job.close()
    tell(capsys, f"{kills} kills of nodes, all resumed")
