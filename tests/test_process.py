"""Garbage is collected rarely, and not at exit, except where triton would then report leaks."""

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
def test_the_collection_at_exit_is_skipped_except_with_triton(module, frozen):
    if module == "triton":
        pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(module=module)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True", str(frozen)], "")
