"""Every I/O call of `train` and the commands beside it fails once: an error of one line or success, then the rest."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from failing_benches import toy_embedder
from failing_calls import DISK, fail_every_call, failing_calls
from failing_commands import COMMANDS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches: more threads would wait for each other, for minutes where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "step"), [("train", 20), ("calibrate", 20), ("finetune", 60)])
def test_any_call_may_fail(tmp_path: Path, name: str, step: int) -> None:
    with toy_embedder(tmp_path.parent / "toy.log"), failing_calls(tmp_path) as calls:
        findings = fail_every_call(COMMANDS[name](tmp_path), calls, DISK, step=step)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
