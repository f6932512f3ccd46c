"""The engine of this process: what it announces before the first images are embedded."""

from dataclasses import replace

import pytest
from toys import toy_plan

from batchverify.engine.base import Task, Workers
from batchverify.engine.threads import MANY, LocalEngine
from batchverify.fingerprint import EmbeddingSettings

ALIGNED = EmbeddingSettings("align", detector="retinaface")


@pytest.mark.parametrize(
    ("count", "settings", "announced"),
    [
        (MANY, ALIGNED, [("suppress", "warp")]),
        (MANY, EmbeddingSettings(), [("integrate", "resample", "suppress")]),
        (MANY, EmbeddingSettings("center"), [()]),
        (MANY - 1, ALIGNED, []),
    ],
    ids=["aligned", "boxes", "no detector", "few"],
)
def test_loops_are_announced_once_where_the_first_chunk_has_many_images(
    tmp_path, monkeypatch, count, settings, announced
):
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr("batchverify.engine.threads.prepare", lambda *names: told.append(names))
    plan = toy_plan(tmp_path, cache=False)
    engine = LocalEngine(replace(plan, load=replace(plan.load, settings=settings)), None, Workers(1, 1, 1))
    loaded = Task(None)
    loaded.images = [None] * MANY
    for _ in range(2):
        engine.embed(loaded, range(count), [b""] * count)
    engine.close()
    assert told == announced
