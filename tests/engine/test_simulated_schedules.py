"""The scheduler in a simulated cluster, under thousands of random schedules.

A seed makes a world (images, of which some kill or hang what has them), and runs on its cache. All runs but the last
may end early: by Ctrl-C, a full disk, or a thread that hangs. The last one scores pairs.

A failing seed is printed. `BATCHVERIFY_SEED=1234 python -m pytest tests/engine/test_simulated_schedules.py` plays it
alone and prints its events; `BATCHVERIFY_SEEDS=100000` plays more seeds than CI does.

The promises, of which `watched_engine.py` checks some at each call:

- Every image has one fate: a vector, the reason that its bytes give, or `crashed`.
- `crashed` is only what lost a worker twice when nothing else ran. What kills its worker each time is `crashed`.
- In a run whose workers are lost by images alone, nothing else is `crashed`.
- A loss halves the chunk, so an image loses few workers. A suspect never runs beside an image that is none.
- The loss of a node is no blame, until an image was lost with more than `NODE_LOSSES` of them.
- An image is loaded again only after a loss or a cut chunk. No content is embedded twice, nor if it is cached.
- Nothing is committed twice. What was embedded is committed, also after Ctrl-C. `crashed` is not committed.
- No worker is idle that could do something, those of a new node included; no more is begun than they need.
- Time passes only while something runs or starts, or for the patience with what hangs. A new node is seen when a call
  ends, at the latest after that patience.
- Blocks of pairs come back once each, in order, with the same scores; only five losses of one block end the run.
"""

import os
from collections import Counter
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from simulation import (
    FAILURES,
    HARMLESS,
    PATIENCE,
    Cluster,
    Content,
    Kind,
    MemoryCache,
    SimulatedEngine,
    Tell,
    World,
)
from watched_engine import WatchedEngine, require

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.scheduler import PAIR_TRIES, SILENCES, STRIKES, ImageRun, score_pairs
from batchverify.errors import ArtifactError, BatchverifyError, HungError
from batchverify.manifest.manifest import Block
from batchverify.progress import Progress
from batchverify.records import Reason

SEEDS, GROUP = int(os.environ.get("BATCHVERIFY_SEEDS", "10000")), 500
CARRIED = pa.record_batch({"row": pa.array([], pa.int64())})


class Story:
    """What happens with a seed."""

    def __init__(self, seed: int, tell: Tell | None = None) -> None:
        self.rng, self.tell = Random(seed), tell
        self.threads = self.rng.random() < 0.1
        self.world = World(self.rng, harmless=self.threads)
        count = len(self.world.contents)
        self.wanted = sorted(self.rng.sample(range(count), self.rng.randint(1, count)))
        if self.rng.random() < 0.8:
            self.wanted = list(range(count))

    def play(self) -> None:
        """Run until a run comes to its end; then score pairs."""
        for last in (False, self.rng.random() < 0.5, True):
            if (ended := self.run(last)) is not None:
                self.score_pairs(*ended)
                return

    def run(self, last: bool) -> tuple[WatchedEngine, EmbeddingTable] | None:
        """One run over the images; None if it ended early."""
        engine = self.engine(last)
        cache, full = self.cache(engine, last)
        run = ImageRun(
            engine,
            self.world.image_paths,
            cache,
            Progress(quiet=True),
            wanted=np.array(self.wanted),
            patience=PATIENCE,
        )
        engine.table = run.embeddings
        error: BaseException | None = None
        try:
            run.run()
        except (KeyboardInterrupt, ArtifactError, HungError) as exc:
            error = exc
        reasons = {
            type(None): True,
            KeyboardInterrupt: engine.interrupted,
            ArtifactError: full,
            HungError: engine.hung,
        }
        require(bool(reasons[type(error)]), f"no reason to end with {error!r}")
        check_cache(self.world, engine, error)
        if error is not None:
            return None
        check_fates(self.world, engine, run, self.wanted)
        check_effort(self.world, engine)
        return engine, run.embeddings

    def engine(self, last: bool) -> WatchedEngine:
        """One for a run, with a cluster of its own."""
        rng = self.rng
        if self.tell is not None:
            self.tell("the last run" if last else "a run that may end early")
        calm = rng.random() < 0.5 or (last and self.threads)
        nodes, size = (1, 2) if self.threads else (rng.randint(1, 3), rng.randint(1, 3))
        cluster = Cluster(self.world, rng, nodes=nodes, size=size, calm=calm, tell=self.tell)
        if not calm:
            cluster.storm(rng.choice([0, 1, 3, 6]), only_hangs=self.threads)
        inner = SimulatedEngine(cluster, rng, chunk=rng.choice([4, 4, 8, 16]), threads=self.threads)
        interrupt = None if last or rng.random() < 0.5 else rng.randint(1, 120)
        return WatchedEngine(inner, cluster, self.wanted, interrupt)

    def cache(self, engine: WatchedEngine, last: bool) -> tuple[MemoryCache, list[bool]]:
        """A cache that presses Ctrl-C or fails once; its list then says so."""
        full: list[bool] = []
        fails_at = 0 if last or self.rng.random() < 0.7 else self.rng.randint(1, 3)
        writes = Counter[str]()

        def before_write() -> None:
            engine.step("write")
            writes["all"] += 1
            if writes["all"] == fails_at:
                full.append(True)
                raise OSError(28, "No space left on device")

        return MemoryCache(self.world, self.rng.choice([1, 4, 1000]), before_write), full

    def score_pairs(self, engine: WatchedEngine, embeddings: EmbeddingTable) -> None:
        """Score random pairs of the wanted images and compare all rows."""
        rng = self.rng
        engine.interrupt = None
        blocks, first = [], 0
        for _ in range(rng.randint(1, 8)):
            pairs = rng.choices(self.wanted, k=2 * rng.randint(1, 3))
            a, b = np.array(pairs[::2]), np.array(pairs[1::2])
            blocks.append(Block(first, CARRIED, a, b))
            first += len(a)
        if not self.threads:
            engine.cluster.storm(rng.choice([0, 0, 2, 6]))
        rows = []
        try:
            for block, scores in score_pairs(
                engine, head, blocks, embeddings, Progress(quiet=True), patience=PATIENCE
            ):
                rows.append((block, scores))
        except BatchverifyError as exc:
            allowed = engine.hung or max(engine.score_losses.values(), default=0) >= PAIR_TRIES
            require(allowed, f"no reason to end with {exc}")
        else:
            require(len(rows) == len(blocks), "blocks are missing")
        for block, (seen, scores) in zip(blocks, rows, strict=False):
            require(block is seen, "blocks in another order")
            usable = embeddings.usable(block.a, block.b)
            expected = head(embeddings.vectors, block.a[usable], block.b[usable])
            require(all(map(np.array_equal, scores, expected)), f"other scores from row {block.first}")
        tries = sum(engine.scores.values()) - sum(engine.score_losses.values())
        require(tries <= len(blocks), "blocks are scored again without a loss")


def head(vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Another score for each pair of vectors, on both sides."""
    return vectors[a, 0].astype(np.float32) * 64 + vectors[b, 0], vectors[b, 0].astype(np.float32)


def check_cache(world: World, engine: WatchedEngine, error: BaseException | None) -> None:
    """What was embedded is in the cache, and it is right."""
    contents = {content.key: content for content in world.contents}
    for key, entry in world.committed.items():
        kind = contents[key].kind
        require(kind in (Kind.GOOD, Kind.MOODY, Kind.TEXT, Kind.FACELESS), f"{kind} is committed")
        expected = contents[key].entry(key)
        right = entry.vector is expected.vector and entry.skipped == expected.skipped
        require(right, f"{key!r} is committed wrongly")
    # The last commit is not repeated if it fails.
    if not isinstance(error, ArtifactError) and not engine.twice and engine.interrupted != "write":
        embedding = [request for request in engine.pending.values() if request.stage == "embed"]
        require(engine.delivered <= world.committed.keys(), "what was embedded is not committed")
        require(isinstance(error, HungError) or not embedding, "chunks were begun and not finished")


def check_fates(world: World, engine: WatchedEngine, run: ImageRun, wanted: list[int]) -> None:
    """Every wanted image has the fate that the rules allow, and no other image has one."""
    table = run.embeddings
    known = np.flatnonzero(table.codes >= 0).tolist()
    require(known == wanted, f"images have a fate: {known}, not {wanted}")
    for number in wanted:
        content, code = world.contents[number], int(table.codes[number])
        reason = list(Reason)[code - 1] if code else None
        if reason is Reason.CRASHED:
            require(engine.alone_losses[number] >= STRIKES, f"image {number} is blamed wrongly")
            harmful = content.kind not in HARMLESS
            require(harmful or engine.cluster.faults > 0, f"image {number} is blamed for others")
        else:
            require(reason is expected_reason(content), f"image {number}, {content.kind}: {reason}")
            right = reason or table.vectors[number, 0] == content.number + 1
            require(bool(right), f"image {number} has another vector")
    progress = run.progress
    require(progress.done == progress.total == len(wanted), f"{progress.done} of {len(wanted)} are done")


def expected_reason(content: Content) -> Reason | None:
    """The fate of an image that loses no worker by chance."""
    if content.kind in (Kind.GOOD, Kind.MOODY):
        return None
    return FAILURES[content.kind].reason if content.kind in FAILURES else Reason.CRASHED


def check_effort(world: World, engine: WatchedEngine) -> None:
    """No image is tried more often than its losses require, and no time is lost."""
    for number, loads in engine.loads.items():
        key = world.contents[number].key
        allowed = 1 + engine.load_losses[number] + engine.cuts[number] + engine.embed_losses[key]
        require(loads <= allowed, f"image {number} is loaded {loads} times, {allowed} would do")
    cluster = engine.cluster
    longest = cluster.busy + cluster.starting + PATIENCE * (SILENCES * cluster.killed + cluster.joined)
    require(cluster.now <= longest, f"took {cluster.now:.0f} s of at most {longest:.0f}")


def check(seed: int, tell: Tell | None = None) -> None:
    """Play a seed; an error states it."""
    try:
        Story(seed, tell).play()
    except Exception as exc:
        raise AssertionError(f"BATCHVERIFY_SEED={seed}: {type(exc).__name__}: {exc}") from exc


CHOSEN = os.environ.get("BATCHVERIFY_SEED")


@pytest.mark.parametrize("first", [int(CHOSEN)] if CHOSEN else range(0, SEEDS, GROUP))
def test_every_schedule_keeps_every_promise(first: int) -> None:
    for seed in range(first, first + (1 if CHOSEN else GROUP)):
        check(seed, print if CHOSEN else None)
