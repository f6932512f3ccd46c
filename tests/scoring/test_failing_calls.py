"""Every I/O call of `score` fails once: an error of one line or success, and the same command then does the rest."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_benches import STATES, score_bench, toy_embedder
from failing_calls import DISK, STORE, fail_every_call, failing_calls
from failing_stores import IN_STORE, failing_store, store_bench
from object_store import Store

# Every how many calls; of a store's commands, too.
STEPS = {"cold": 9, "finished": 1}
STORE_STEPS = {"score, one file": 16, "score, a folder": 32, "evaluate": 100}
# What the others of it show in less time.
UNSAMPLED = "train, manifests and images"


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["one.parquet", "folder"])
def test_any_call_of_a_job_may_fail(tmp_path: Path, name: str, state: str) -> None:
    with toy_embedder(tmp_path.parent / "toy.log"), failing_calls(tmp_path) as calls:
        bench = score_bench(tmp_path, name, state)
        findings = fail_every_call(bench, calls, DISK, step=STEPS.get(state, 17))
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with failing_store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.mark.parametrize("name", [name for name in IN_STORE if name != UNSAMPLED])
def test_any_call_to_an_object_store_may_fail(tmp_path: Path, store: Store, name: str) -> None:
    with toy_embedder(tmp_path.parent / "toy.log"), failing_calls(tmp_path, stores=True) as calls:
        findings = fail_every_call(store_bench(tmp_path, name, store), calls, STORE, step=STORE_STEPS.get(name, 40))
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
