"""Every I/O call of `train` and the commands beside it fails once: an error of one line or success, then the rest."""

from pathlib import Path

import pytest
from failing_benches import toy_embedder
from failing_calls import DISK, fail_every_call, failing_calls
from failing_commands import COMMANDS
from torch_threads import one_torch_thread

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.mark.parametrize(("name", "step"), [("train", 20), ("calibrate", 20), ("finetune", 60)])
def test_any_call_may_fail(tmp_path: Path, name: str, step: int) -> None:
    with toy_embedder(tmp_path.parent / "toy.log"), failing_calls(tmp_path) as calls:
        findings = fail_every_call(COMMANDS[name](tmp_path), calls, DISK, step=step)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
