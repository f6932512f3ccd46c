"""The kept machine code of the loops: used again, made anew where it is damaged, done without where it cannot be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "batchverify"

# A sum of a picture, and how many times the loop was compiled for it.
CALL = """
import numpy as np
from batchverify.kernels import integrate
image, sums = np.full((3, 5, 3), 2, np.uint8), np.empty((4, 6, 4), np.int32)
integrate(image, sums)
print(sums[3, 5, 0], sum(integrate.stats.cache_misses.values()))
"""
# No file may grow beyond 100 bytes: what a full disk does.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"


def call(folder: Path | str, code: str = CALL, *, at: Path = PACKAGE.parent, **environment: str) -> str:
    """What the code prints with the package at a folder."""
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(at), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=at)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the machine code of one loop."""
    folder = tmp_path_factory.mktemp("code")
    assert call(folder) == "30 1"
    return folder


def test_what_was_compiled_is_used_again(kept):
    assert call(kept) == "30 0"


def test_loops_that_close_over_loops_are_used_again(tmp_path):
    code = """
import numpy as np
from batchverify.winograd import THREE, WinogradConvolution, _loop
zeros = np.zeros(16, np.float32)
convolution = WinogradConvolution(np.ones((16, 16, 3, 3), np.float32), zeros, zeros)
print(convolution(np.ones((1, 3, 3, 16), np.float32))[0, 0, 0, 0])
print(sum(_loop(THREE, False).stats.cache_misses.values()))
"""
    assert [call(tmp_path, code).split() for _ in range(2)] == [["144.0", "1"], ["144.0", "0"]]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_loops_of_one_name_from_two_processes_are_not_mixed_up(tmp_path, order):
    code = """
import numpy as np, sys
from batchverify.winograd import WinogradConvolution
zeros, ones = np.zeros(16, np.float32), np.ones((1, 9, 9, 16), np.float32)
for stride in ORDER:
    convolution = WinogradConvolution(np.ones((16, 16, 3, 3), np.float32), zeros, zeros, stride=stride)
    print({round(each, 3) for each in convolution(ones).reshape(-1).tolist()})
"""
    for strides in ([order[0]], [order[1]], order, order[::-1]):
        found = call(tmp_path, code.replace("ORDER", repr(tuple(strides))))
        assert found.splitlines() == ["{144.0}"] * len(strides)


@pytest.mark.parametrize("size", [0, 60])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_code_is_made_anew(kept, kind, size):
    (file,) = kept.rglob(f"kernels.integrate*.{kind}")
    file.write_bytes(file.read_bytes()[:size])
    assert call(kept) == "30 1"
    assert call(kept) == "30 0"


def test_a_full_disk_is_done_without(tmp_path):
    assert call(tmp_path, FULL + CALL) == "30 1"
    assert call(tmp_path) == "30 1"
    assert call(tmp_path) == "30 0"


def test_without_any_folder_it_is_compiled_every_time(tmp_path):
    package = tmp_path / "batchverify"
    package.mkdir()
    for name in ("__init__", "kernels", "machine_code", "instructions"):
        shutil.copy(PACKAGE / f"{name}.py", package)
    # A file where a folder would be made stops an administrator, too.
    for name in ("batchverify/__pycache__", "home"):
        (tmp_path / name).write_text("")
    home = str(tmp_path / "home")
    for _ in range(2):
        assert call(home, at=tmp_path, HOME=home, XDG_CACHE_HOME=home) == "30 1"


def test_another_cpu_has_files_of_its_own(kept):
    other = "from llvmlite import binding; binding.get_host_cpu_name = lambda: 'another'\n"
    before = set(kept.rglob("*.nbc"))
    call(kept, other + CALL)
    assert len(set(kept.rglob("*.nbc")) - before) == 1
