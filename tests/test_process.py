"""A process of ours searches for garbage rarely; at its end not at all, but where that would make triton complain."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, gc
usual = gc.get_threshold()[0]
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from batchverify.process import collect_rarely
collect_rarely()
print(gc.get_threshold()[0] > usual)
import {module}
"""


@pytest.mark.parametrize(("module", "frozen"), [("numpy", True), ("triton", False)])
def test_the_last_search_is_left_out_but_beside_triton(module, frozen):
    if module == "triton":
        pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True", str(frozen)], "")
