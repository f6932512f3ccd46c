"""After real kills at random moments, the same command gives the rows of an undisturbed run; no work is repeated."""

import random

import pyarrow as pa
import pytest
from killing import Blow, KilledJob, draw_pairs

IMAGES, PAIRS, PART = 240, 6000, 500


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


@pytest.mark.parametrize("name", ["out.parquet", "folder"])
def test_the_driver_is_killed_at_random_moments(manifest, undisturbed, tmp_path, name):
    generator = random.Random(name)
    # The kill comes at most 0.05 s after a part; the next part takes at least 0.2 s.
    job = KilledJob(manifest, tmp_path / name, tmp_path / "cache", PART, pause=0.2)
    if name == "folder":
        job.kill("Ctrl-C", generator.uniform(1.5, 4.0))
    assert job.kill("SIGKILL", generator.uniform(0, 0.05), wait_for="part")
    done = job.files("part")
    summary = check(job, undisturbed)
    assert summary["resumed_rows"] == done * PART > 0


@pytest.mark.ray
def test_a_worker_and_an_actor_are_killed(manifest, undisturbed, tmp_path):
    # A fast machine may finish before both kills: then try another job.
    for number in range(4):
        job = KilledJob(manifest, tmp_path / f"{number}.parquet", tmp_path / f"{number}", PART, engine="ray")
        # The actor first: the run continues until there is another one.
        kills = job.run([Blow("actor", 0, "segment"), Blow("worker", 0)])
        check(job, undisturbed)
        if kills == 2:
            break
    assert kills == 2
