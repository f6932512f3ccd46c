"""The scheduler with both engines: once per image, in order, whatever dies on the way."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import POISON, SLEEP, ToyPlan, colour, draw, toy_plan

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.engine.base import CPU_CHUNK, Engine, WorkerLostError, Workers
from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.scheduler import PATIENCE_SECONDS, ImageRun, score_pairs
from batchverify.engine.stages import EmbeddedChunk, LoadedChunk, PairScores
from batchverify.engine.threads import LocalEngine
from batchverify.errors import BatchverifyError
from batchverify.manifest.manifest import Block
from batchverify.progress import Progress
from batchverify.records import Reason, Skipped


def open_cache(plan: ToyPlan) -> EmbeddingCache:
    assert plan.load.cache
    cache = EmbeddingCache(plan.load.cache, plan.load.fingerprint)
    cache.create()
    cache.refresh()
    return cache


def run(
    engine: Engine, plan: ToyPlan, image_paths: list, patience: float = PATIENCE_SECONDS
) -> tuple[EmbeddingTable, Progress]:
    progress = Progress(quiet=True)
    cache = open_cache(plan) if plan.load.cache else None
    return ImageRun(engine, image_paths, cache, progress, patience=patience).run(), progress


def local(plan: ToyPlan) -> LocalEngine:
    index = open_cache(plan).index if plan.load.cache else None
    return LocalEngine(plan, index, Workers(2, 1, 2))


def on_ray(plan: ToyPlan, chunk: int = CPU_CHUNK, **options: Any):
    from batchverify.engine.ray.engine import RayEngine

    class Engine(RayEngine):
        """Has tasks of at most `chunk` images."""

        @property
        def workers(self) -> Workers:
            return replace(super().workers, chunk=chunk)

    return Engine(plan, open_cache(plan).index if plan.load.cache else None, **options)


def mixed_references(folder: Path) -> list:
    """300 pictures, 20 of them under two paths far apart, and one of every failure that loading finds."""
    image_paths: list = [draw(folder / f"{number}.png", colour(number)) for number in range(300)]
    image_paths += [draw(folder / f"again-{number}.png", colour(number)) for number in range(20)]
    (folder / "text.png").write_text("no picture")
    (folder / "text-again.png").write_text("no picture")
    refused = Skipped(Reason.FORBIDDEN, "refused")
    bad = [
        str(folder / "absent.png"),
        str(folder),
        str(folder / "text.png"),
        refused,
        str(folder / "text-again.png"),
    ]
    return image_paths[:150] + bad + image_paths[150:]


def check_mixed(embeddings: EmbeddingTable, progress: Progress) -> None:
    reasons = embeddings.reasons(np.arange(150, 155)).to_pylist()
    assert reasons == ["not_found", "unreadable", "undecodable", "forbidden", "undecodable"]
    assert (progress.failed, progress.done, progress.total) == (5, 325, 325)
    good = [index for index in range(325) if not 150 <= index < 155]
    assert (embeddings.codes[good] == 0).all()
    assert np.array_equal(embeddings.vectors[:20], embeddings.vectors[-20:])
    assert len({row.tobytes() for row in embeddings.vectors[good]}) == 300


def test_every_image_once_and_equal_bytes_once(tmp_path):
    plan, image_paths = toy_plan(tmp_path), mixed_references(tmp_path / "pictures")
    engine = local(plan)
    embeddings, progress = run(engine, plan, image_paths)
    engine.close()
    check_mixed(embeddings, progress)
    assert plan.count() == progress.embedded == 300
    assert progress.repeated == 20


def test_a_second_run_embeds_nothing_and_gives_the_same_bits(tmp_path):
    plan, image_paths = toy_plan(tmp_path), mixed_references(tmp_path / "pictures")
    first, _ = run(local(plan), plan, image_paths)
    again, progress = run(local(plan), plan, image_paths)
    assert plan.count() == 300
    assert (progress.embedded, progress.cached, progress.failed) == (0, 320, 5)
    assert np.array_equal(first.vectors, again.vectors)
    assert np.array_equal(first.codes, again.codes)


def test_without_a_cache_everything_is_embedded_again(tmp_path):
    plan = toy_plan(tmp_path, cache=False)
    image_paths = [draw(tmp_path / "pictures" / f"{number}.png", colour(number)) for number in range(5)]
    run(local(plan), plan, image_paths)
    run(local(plan), plan, image_paths)
    assert plan.count() == 10
    assert not (tmp_path / "cache").exists()


def test_large_pictures_are_loaded_in_smaller_bites(tmp_path):
    plan = toy_plan(tmp_path)
    plan = replace(plan, load=replace(plan.load, pixel_budget=200_000))  # two faces of 160 x 160
    image_paths = [draw(tmp_path / "pictures" / f"{number}.png", colour(number)) for number in range(50)]
    embeddings, _ = run(local(plan), plan, image_paths)
    assert (embeddings.codes == 0).all()
    assert plan.count() == 50


class Impatient(LocalEngine):
    """Presses Ctrl-C after the first chunk."""

    plan: ToyPlan

    def wait(self, tasks, timeout):
        if self.plan.count():
            raise KeyboardInterrupt
        return super().wait(tasks, timeout)


def test_ctrl_c_keeps_what_was_embedded(tmp_path):
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / "pictures" / f"{number}.png", colour(number)) for number in range(200)]
    with pytest.raises(KeyboardInterrupt):
        run(Impatient(plan, open_cache(plan).index, Workers(1, 1, 1, chunk=10)), plan, image_paths)
    kept = plan.count()
    assert 10 <= kept < 200
    assert len(open_cache(plan).index.keys) == kept
    _, progress = run(local(plan), plan, image_paths)
    assert (progress.cached, progress.embedded) == (kept, 200 - kept)


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_ray_does_what_threads_do(tmp_path):
    image_paths = mixed_references(tmp_path / "pictures")
    threads, cluster = toy_plan(tmp_path / "threads"), toy_plan(tmp_path / "ray")
    for plan in (threads, cluster):
        Path(plan.log).parent.mkdir()
    expected, _ = run(local(threads), threads, image_paths)
    engine = on_ray(cluster)
    embeddings, progress = run(engine, cluster, image_paths)
    engine.close()
    check_mixed(embeddings, progress)
    assert cluster.count() == 300
    assert np.array_equal(embeddings.vectors, expected.vectors)


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_pictures_that_kill_their_worker_become_crashed_and_nothing_else_does(tmp_path):
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / "pictures" / f"{number}.png", colour(number)) for number in range(12)]
    image_paths[2] = draw(tmp_path / "pictures" / "poison.png", POISON)
    image_paths[9] = draw(tmp_path / "pictures" / "poison-again.png", POISON)
    engine = on_ray(plan, chunk=4)
    embeddings, progress = run(engine, plan, image_paths)
    engine.close()
    assert embeddings.failures() == {"crashed": 2}
    assert embeddings.reasons(np.array([2, 9])).to_pylist() == ["crashed", "crashed"]
    assert (progress.embedded, progress.failed) == (10, 2)
    # What crashed is not cached: another run tries it again.
    assert len(open_cache(plan).index.keys) == 10
    assert not open_cache(plan).index.failures


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_a_picture_that_hangs_its_worker_becomes_crashed(tmp_path):
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / "pictures" / f"{number}.png", colour(number)) for number in range(1)]
    image_paths.append(draw(tmp_path / "pictures" / "sleep.png", SLEEP))
    engine = on_ray(plan)
    embeddings, progress = run(engine, plan, image_paths, patience=2)
    engine.close()
    assert embeddings.reasons(np.arange(2)).to_pylist() == [None, "crashed"]
    assert (progress.embedded, progress.failed) == (1, 1)


def test_threads_that_hang_end_the_run_with_the_image_named(tmp_path):
    plan = toy_plan(tmp_path)
    slow = draw(tmp_path / "slow.png", colour(1))
    engine = Sleepy(plan, None, Workers(1, 1, 2))
    with pytest.raises(BatchverifyError, match=f"no progress at {slow}"):
        ImageRun(engine, [slow], None, Progress(quiet=True), patience=0.1).run()


class Forgetful(LocalEngine):
    """Loses the worker of its first task of one kind; `first` runs just before."""

    def __init__(self, plan, lost, first=lambda: None):
        super().__init__(plan, open_cache(plan).index, Workers(1, 1, 1))
        self._lost, self._first = lost, first

    def result(self, task):
        value = super().result(task)
        kinds = {LoadedChunk: "load", EmbeddedChunk: "embed", PairScores: "score"}
        if kinds[type(value)] == self._lost:
            self._lost = ""
            self._first()
            raise WorkerLostError("the node is gone")
        return value


@pytest.mark.parametrize("lost", ["load", "embed"])
def test_pictures_of_equal_bytes_survive_their_worker(tmp_path, lost):
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / f"{name}.png", colour(7)) for name in "abc"]
    embeddings, progress = run(Forgetful(plan, lost), plan, image_paths)
    assert embeddings.codes.tolist() == [0, 0, 0]
    assert (plan.count(), progress.done) == (2 if lost == "embed" else 1, 3)


def test_a_picture_that_vanishes_with_its_worker_takes_no_other_along(tmp_path):
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / f"{name}.png", colour(7)) for name in "ab"]
    engine = Forgetful(plan, "embed", first=Path(image_paths[0]).unlink)
    embeddings, _ = run(engine, plan, image_paths)
    assert embeddings.reasons(np.arange(2)).to_pylist() == ["not_found", None]


class Unlucky(LocalEngine):
    """Loses the worker that loads `image` twice: beside others, and by chance once it is alone."""

    image, losses = "", 2

    def __init__(self, *plan_and_more):
        super().__init__(*plan_and_more)
        self.loading = {}

    def load(self, image_paths):
        task = super().load(image_paths)
        self.loading[task] = image_paths
        return task

    def result(self, task):
        value = super().result(task)
        if self.losses and self.image in self.loading.get(task, ()):
            self.losses -= 1
            raise WorkerLostError("a worker died")
        return value


def test_a_picture_is_not_blamed_for_what_ran_beside_it(tmp_path):
    """Found by the simulation: a chunk of one image was struck although others ran, so one more loss condemned it."""
    plan = toy_plan(tmp_path)
    engine = Unlucky(plan, None, Workers(1, 1, 2, chunk=4))
    image_paths = [draw(tmp_path / f"{name}.png", colour(7)) for name in "ab"]
    engine.image = image_paths[0]
    embeddings, _ = run(engine, plan, image_paths)
    assert engine.losses == 0
    assert embeddings.codes.tolist() == [0, 0]


def rows_of(plan: ToyPlan, folder: str) -> int:
    """How many rows the cache's segments of a kind have together."""
    files = Path(plan.load.cache or "").glob(f"v1/*/{folder}/*.parquet")
    return sum(pq.read_metadata(file).num_rows for file in files)


def test_a_failure_of_equal_bytes_is_stored_once(tmp_path):
    """Found by the simulation: it was stored again if a commit or two lay between them."""
    plan = toy_plan(tmp_path)
    image_paths = []
    for number in range(6):
        image_paths.append(str(tmp_path / f"{number}.png"))
        Path(image_paths[-1]).write_text("no picture" if number % 5 == 0 else f"no picture {number}")
    cache = EmbeddingCache(plan.load.cache or "", plan.load.fingerprint, commit_rows=1)
    cache.create()
    engine = LocalEngine(plan, cache.index, Workers(1, 1, 1, chunk=4))
    ImageRun(engine, image_paths, cache, Progress(quiet=True)).run()
    assert rows_of(plan, "fail") == 5


class Together(LocalEngine):
    """Waits for all tasks and hands them over in reverse order."""

    def wait(self, tasks, timeout):
        tasks = list(tasks)
        while len(done := super().wait(tasks, timeout)) < len(tasks):
            pass
        return sorted(done, key=tasks.index, reverse=True)


class InterruptedCache(EmbeddingCache):
    """Commits each entry at once. Ctrl-C is pressed before the first time."""

    interrupted = False

    def commit(self):
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        super().commit()


def test_ctrl_c_while_the_cache_is_written_stores_nothing_twice(tmp_path):
    """Found by the simulation: what was being stored came last, when the cache no longer knew that it had it."""
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / f"{number}.png", colour(number)) for number in range(4)]
    cache = InterruptedCache(plan.load.cache or "", plan.load.fingerprint, commit_rows=1)
    cache.create()
    engine = Together(plan, cache.index, Workers(2, 1, 4, chunk=4))
    with pytest.raises(KeyboardInterrupt):
        ImageRun(engine, image_paths, cache, Progress(quiet=True)).run()
    assert cache.interrupted
    assert rows_of(plan, "data") == plan.count() == 4


class Frozen(LocalEngine):
    """The first worker that scores hangs until it is killed."""

    frozen, killed = True, ""

    def wait(self, tasks, timeout):
        return [] if self.frozen else super().wait(tasks, timeout)

    def kill(self, task, work):
        self.frozen, self.killed = False, work

    def result(self, task):
        if self.killed:
            self.killed = ""
            raise WorkerLostError("killed")
        return super().result(task)


def test_pairs_of_a_worker_that_hangs_are_scored_by_another_one(tmp_path):
    """Found by the simulation: they were waited for without end."""
    embeddings = EmbeddingTable(2)
    for index in range(2):
        embeddings.put(index, np.ones(512, np.float16))
    block = Block(6, pa.record_batch({"row": [0]}), np.array([0]), np.array([1]))

    class Half:
        needs_torch = False

        def score_pairs(self, vectors, a, b):
            return np.full(1, 0.5, np.float32), np.ones(1, np.float32)

    engine = Frozen(toy_plan(tmp_path), None, Workers(1, 1, 1))
    ((_, scores),) = score_pairs(engine, Half(), [block], embeddings, Progress(quiet=True), patience=1)
    assert scores[0].tolist() == [0.5]
    assert not engine.frozen


def test_pairs_are_scored_again_when_their_worker_is_lost(tmp_path):
    plan, embeddings = toy_plan(tmp_path), EmbeddingTable(4)
    for index in range(4):
        embeddings.put(index, np.full(512, index + 1, np.float16))
    carried = pa.record_batch({"row": [0, 1, 2]})
    block = Block(0, carried, np.array([0, 1, 2]), np.array([1, 2, 3]))

    class First:
        needs_torch = False

        def score_pairs(self, vectors, a, b):
            return (vectors[a] + vectors[b])[:, 0].astype(np.float32), vectors[a, 0].astype(np.float32)

    for lost in ("score", ""):
        progress = Progress(quiet=True)
        ((_, scores),) = score_pairs(Forgetful(plan, lost), First(), iter([block]), embeddings, progress)
        assert scores[0].tolist() == [3, 5, 7]
        assert progress.worker_memory > 0 and progress.watch.seconds["score"] > 0


def test_pairs_that_lose_every_worker_end_the_run_with_the_reason(tmp_path):
    embeddings = EmbeddingTable(2)
    embeddings.put(0, np.ones(512, np.float16))
    embeddings.put(1, np.ones(512, np.float16))
    block = Block(0, pa.record_batch({"row": [0]}), np.array([0]), np.array([1]))

    class Lost:
        needs_torch = False

        def score_pairs(self, vectors, a, b):
            raise WorkerLostError("no node left")

    with pytest.raises(
        BatchverifyError, match="rows from row 1: 5 workers died while scoring them, the last with: no node"
    ):
        list(score_pairs(local(toy_plan(tmp_path)), Lost(), iter([block]), embeddings, Progress(quiet=True)))


def test_patience_with_pairs_says_what_it_waits_for(tmp_path, capsys):
    embeddings = EmbeddingTable(2)
    for index in range(2):
        embeddings.put(index, np.ones(512, np.float16))
    block = Block(6, pa.record_batch({"row": [0]}), np.array([0]), np.array([1]))

    class Slow:
        needs_torch = False

        def score_pairs(self, vectors, a, b):
            time.sleep(0.5)
            return np.zeros(1, np.float32), np.ones(1, np.float32)

    engine = local(toy_plan(tmp_path))
    list(score_pairs(engine, Slow(), iter([block]), embeddings, Progress(), patience=0.1))
    assert "no progress for 0.1 s: waiting for the scores of 1 rows from row 7" in capsys.readouterr().err


class Sleepy(LocalEngine):
    """Takes half a second to load a chunk."""

    def _load(self, task, image_paths):
        time.sleep(0.5)
        return super()._load(task, image_paths)


def test_patience_says_what_it_waits_for(tmp_path, capsys):
    plan = toy_plan(tmp_path)
    slow = draw(tmp_path / "slow.png", colour(1))
    engine = Sleepy(plan, None, Workers(1, 1, 2))
    embeddings = ImageRun(engine, [slow], None, Progress(), patience=0.3).run()
    assert embeddings.codes.tolist() == [0]
    said = capsys.readouterr().err
    assert "waiting for 1 chunks to load" in said
    assert slow in said


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_workers_without_a_place_are_waited_for_and_nobody_is_blamed(tmp_path, caplog):
    import ray

    class Other:
        def ready(self):
            return True

    other = ray.remote(num_cpus=2)(Other).remote()
    ray.get(other.ready.remote())
    plan = toy_plan(tmp_path)
    image_paths = [draw(tmp_path / "pictures" / f"{number}.png", colour(number)) for number in range(2)]
    engine = on_ray(plan, placing_seconds=1)
    leaving = threading.Timer(4, ray.kill, [other])
    leaving.start()
    embeddings, _ = run(engine, plan, image_paths)
    engine.close()
    assert embeddings.codes.tolist() == [0, 0]
    assert "waiting for the cluster to place workers" in caplog.text
