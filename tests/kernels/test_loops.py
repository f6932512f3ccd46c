"""The compiled loops against their plain twins, and the door that chooses between them, whatever fails."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from repository import PACKAGE, REPOSITORY

from batchverify.errors import UsageError
from batchverify.faces.pyramid import integral
from batchverify.kernels import loops, numba_loops, plain_loops
from batchverify.kernels.loops import Door

RNG = np.random.default_rng(11)
BOTH = (numba_loops, plain_loops)
SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (250, 250), (131, 77)]


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_the_door_offers_every_loop_and_each_has_a_twin():
    names = {name for name, each in vars(numba_loops).items() if hasattr(each, "py_func")}
    for name in [each for each in names if not each.startswith("_")]:
        assert callable(getattr(plain_loops, name)), name
        assert getattr(loops, name).__doc__, name
    assert float(numba_loops._EPSILON) == pytest.approx(plain_loops.EPSILON)
    assert numba_loops._LANES == plain_loops.LANES


@pytest.mark.parametrize("size", [*SIZES, (0, 4), (4, 0)])
def test_integrals(size):
    image = noise(*size, 3)
    tables = []
    for each in BOTH:
        sums = np.full((size[0] + 1, size[1] + 1, 4), 7, np.int32)
        each.integrate(image, sums)
        tables.append(sums)
    assert np.array_equal(tables[0], tables[1])
    assert np.array_equal(tables[0][-1, -1, :3], image.sum(axis=(0, 1)))


def test_integrals_beyond_31_bits_wrap_around():
    image, tables = np.full((2200, 4000, 3), 255, np.uint8), []
    for each in BOTH:
        tables.append(np.empty((2201, 4001, 4), np.int32))
        each.integrate(image, tables[-1])
    assert np.array_equal(tables[0], tables[1])
    assert tables[0][-1, -1, 0] < 0


@pytest.mark.parametrize("reciprocal", [True, False])
def test_resampled_regions(reciprocal):
    sums = integral(noise(97, 143, 3))
    low = RNG.integers(0, (143, 97), (40, 2))
    high = low + 1 + RNG.integers(0, 10_000, (40, 2)) % (np.array([143, 97]) - low)
    regions = np.concatenate([low, high], axis=1)
    sizes = RNG.integers(1, 20, (40, 2))
    places = np.concatenate([np.arange(40)[:, None], RNG.integers(0, 5, (40, 2)), sizes], axis=1)
    for count in (40, 1, 0):
        patches = np.full((2, 40, 24, 24, 3), np.nan, np.float32)
        for each, target in zip(BOTH, patches, strict=True):
            each.resample(sums, regions[:count], places[:count], reciprocal, target)
        assert np.array_equal(patches[0], patches[1], equal_nan=True)
        assert np.isfinite(patches[0]).sum() == 3 * sizes[:count].prod(axis=1).sum()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 300])
def test_suppression(count):
    dropped = 0
    for threshold in (0.0, 0.3, 0.5, 0.7):
        low = RNG.uniform(-20, 200, (count, 2))
        boxes = np.concatenate([low, low + RNG.uniform(0, 90, (count, 2))], axis=1).astype(np.float32)
        boxes[count // 2 :: 3] = boxes[: len(boxes[count // 2 :: 3])]
        boxes[::5, 2:] = boxes[::5, :2]
        order = RNG.permutation(count)
        kept = [each.suppress(boxes, order, threshold) for each in BOTH]
        assert np.array_equal(kept[0], kept[1])
        assert kept[0].dtype == kept[1].dtype == np.int64
        dropped += count - len(kept[0])
    assert (dropped > 0) == (count > 2)


@pytest.mark.parametrize("reach", [1.0, 1.5, 2.0, 4.3])
@pytest.mark.parametrize("size", SIZES)
def test_warps(size, reach):
    image = noise(*size, 3)
    for degrees in (0, 33, 180):
        turn = reach * np.exp(1j * np.deg2rad(degrees))
        affine = np.array([[turn.real, -turn.imag, size[1] / 3], [turn.imag, turn.real, -4.3]])
        crops = np.full((2, 20, 31, 3), 99, np.uint8)
        for each, crop in zip(BOTH, crops, strict=True):
            each.warp(image, affine, reach, crop)
        assert np.array_equal(crops[0], crops[1])


def pair_sums(way: Any, first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    sums = np.full((2, len(a)), 3, np.float32)
    bits = np.int16 if first.dtype == np.float16 else np.int32
    way.distances(first.view(bits), second.view(bits), a, b, *sums)
    return sums


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_distances(count, kind):
    for width in (32, 512):
        first, second = (RNG.normal(size=(rows, width)).astype(kind) for rows in (40, 7))
        first[1] = second[2] = 0
        a, b = RNG.integers(0, 40, count), RNG.integers(0, 7, count)
        found = [pair_sums(each, first, second, a, b) for each in BOTH]
        assert np.array_equal(found[0], found[1])
        assert (found[0] != 3).all()


def test_distances_of_every_half_precision_number():
    numbers = np.zeros((1 << 16, 32), np.float16)
    numbers[:, 0] = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    other = np.zeros((1, 32), np.float16)
    other[0, 0] = 1
    a, b = np.arange(1 << 16), np.zeros(1 << 16, np.int64)
    found = [pair_sums(each, numbers, other, a, b) for each in BOTH]
    wide = pair_sums(numba_loops, numbers.astype(np.float32), other.astype(np.float32), a, b)
    assert np.array_equal(found[0], found[1], equal_nan=True)
    assert np.array_equal(found[0], wide, equal_nan=True)
    assert np.array_equal(np.isfinite(found[0][1]), np.isfinite(numbers[:, 0]))


# A sum of a picture, and how many times the loop was compiled, or where its twin comes from.
CALL = """
import logging, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import numpy as np
from batchverify.kernels import loops
image, sums = np.full((3, 5, 3), 2, np.uint8), np.empty((4, 6, 4), np.int32)
for _ in range(2):
    loops.integrate(image, sums)
loop = loops.door.chosen["integrate"]
print(sums[3, 5, 0], sum(loop.stats.cache_misses.values()) if hasattr(loop, "stats") else loop.__module__)
"""
# After every damage to its stored code the same in three processes, one after the other: forks, since importing numba
# takes half a second.
DAMAGED = f"""
import os, sys
from pathlib import Path
import numba
# numba unpickles two objects of the index and one of the code. None cuts a file: the index behind its first object.
for kind, content in (("nbi", b""), ("nbi", None), ("nbc", None), ("nbc", b"not a pickle")):
    (file,) = Path(os.environ["NUMBA_CACHE_DIR"]).rglob("numba_loops.integrate*." + kind)
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    for _ in range(3):
        if not os.fork():
            exec({CALL!r})
            sys.stdout.flush()
            os._exit(0)
        assert os.wait()[1] == 0
"""
PLAIN = "30 batchverify.kernels.plain_loops"
# No file may grow beyond 100 bytes: what a full disk does.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
# A user id that no list of users has, and no HOME: as in containers that run under any user id.
HOMELESS = "import os; os.getuid = lambda: 4_000_000_123; del os.environ['HOME'], os.environ['XDG_CACHE_HOME']\n"
# Every import of numba fails.
ABSENT = "import sys; sys.modules['numba'] = None\n"


def call(folder: Path | str, code: str = CALL, *, at: Path = PACKAGE.parent, **environment: str) -> list[str]:
    """The lines that the code prints with the package at a folder."""
    ours = {
        "NUMBA_CACHE_DIR": str(folder),
        "PYTHONPATH": str(at),
        loops.VARIABLE: "on",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    variables = {**os.environ, **ours, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=at)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the machine code of one loop."""
    folder = tmp_path_factory.mktemp("code")
    assert call(folder) == ["30 1"]
    return folder


def test_what_was_compiled_is_used_again(kept):
    assert call(kept) == ["30 0"]


def test_damaged_code_is_compiled_again_with_one_warning(kept):
    lines = call(kept, DAMAGED)
    assert len(lines) == 4 * 4
    for number in range(4):
        warning, *results = lines[4 * number : 4 * number + 4]
        assert warning.startswith("the compiled loop integrate failed (")
        assert warning.endswith("it was compiled again")
        # Compiled for the second time without a warning: the damaged file is not read again.
        assert results == ["30 1", "30 1", "30 0"]


def test_a_full_disk_is_done_without(tmp_path):
    warning, result = call(tmp_path, FULL + CALL)
    assert "the compiled loop integrate failed (OSError" in warning
    assert result == "30 1"
    assert call(tmp_path) == ["30 1"]
    assert call(tmp_path) == ["30 0"]


def test_without_any_folder_it_is_compiled_every_time(tmp_path):
    package = tmp_path / "batchverify"
    shutil.copytree(PACKAGE / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "version.py", "errors.py"):
        shutil.copy(PACKAGE / name, package)
    # A file where a folder would be made stops an administrator, too.
    for name in ("batchverify/kernels/__pycache__", "home"):
        (tmp_path / name).write_text("")
    home, before = str(tmp_path / "home"), sorted(tmp_path.rglob("*"))
    for _ in range(2):
        assert call(home, at=tmp_path, HOME=home, XDG_CACHE_HOME=home) == ["30 1"]
    # numba would make these folders where the command runs: `~` without a home, and what is no absolute path.
    assert call("", HOMELESS + CALL, at=tmp_path, XDG_CACHE_HOME="") == ["30 1"]
    assert call(home, at=tmp_path, HOME=home, XDG_CACHE_HOME="relative") == ["30 1"]
    assert sorted(tmp_path.rglob("*")) == before


def test_off_takes_the_twins_and_imports_no_numba(tmp_path):
    code = f"{CALL}\nprint('numba' in sys.modules)"
    assert call(tmp_path, code, BATCHVERIFY_KERNELS="off") == [PLAIN, "False"]


def test_without_numba_the_twins_are_taken_with_one_line(tmp_path):
    warning, result = call(tmp_path, ABSENT + CALL)
    assert warning.startswith("numba cannot be imported (ModuleNotFoundError: ")
    assert result == PLAIN


BOXES, ORDER = np.ones((1, 4), np.float32), np.zeros(1, np.int64)


def door_to(**compiled: object) -> Door:
    """A door as before its first call, which takes compiled loops from the start, some of them replaced."""
    given = SimpleNamespace(**{**vars(numba_loops), **compiled})
    return Door(lambda: "on", lambda: given)


@pytest.mark.parametrize("value", ["ON", "numba", "0"])
def test_other_values_are_refused(monkeypatch, value):
    monkeypatch.setenv(loops.VARIABLE, value)
    with pytest.raises(UsageError, match=f"BATCHVERIFY_KERNELS must be auto, on or off, got '{value}'"):
        Door().run("suppress", BOXES, ORDER, 0.5)


def test_twins_serve_until_numba_is_worth_its_start_and_has_started():
    begun, may_end = threading.Event(), threading.Event()

    def slow_import() -> object:
        begun.set()
        assert may_end.wait(60)
        return numba_loops

    door = Door(lambda: "auto", slow_import)
    assert door.run("suppress", BOXES, ORDER, 0.5).tolist() == [0]
    assert not begun.is_set() and 0 < door.spent < door.patience
    door.spent = door.patience
    for _ in range(2):  # a call does not wait
        assert door.run("suppress", BOXES, ORDER, 0.5).tolist() == [0]
    assert begun.wait(60) and not door.chosen
    may_end.set()
    while not door.chosen:
        assert door.run("suppress", BOXES, ORDER, 0.5).tolist() == [0]
    assert door.chosen == {"suppress": numba_loops.suppress}


def test_a_loop_that_cannot_be_compiled_gives_way_to_its_twin(caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("no code")

    door = door_to(suppress=broken)
    for _ in range(2):
        assert door.run("suppress", BOXES, ORDER, 0.5).tolist() == [0]
    (record,) = caplog.records
    assert "the compiled loop suppress failed (RuntimeError: no code): numpy is used instead" in record.message
    assert door.chosen["suppress"] is plain_loops.suppress


def test_no_memory_is_no_fault_of_the_loop_and_the_callers_mistakes_are_theirs(caplog):
    def exhausted(*_: object) -> None:
        raise MemoryError

    door = door_to(suppress=exhausted)
    with pytest.raises(MemoryError):
        door.run("suppress", BOXES, ORDER, 0.5)
    with pytest.raises(TypeError):
        door.run("integrate", None, None)
    assert door.chosen["integrate"] is numba_loops.integrate
    assert not caplog.records


def test_numba_starts_where_much_work_is_announced():
    tried: list[str] = []

    def broken(name: str) -> None:
        tried.append(name)
        raise RuntimeError("no code")

    given = SimpleNamespace(**{**vars(numba_loops), "try_out": broken})
    door = Door(lambda: "auto", lambda: given)
    door.prepare()
    assert not door.spent
    door.prepare("suppress", "warp")
    while not door.chosen:
        assert door.run("suppress", BOXES, ORDER, 0.5).tolist() == [0]
    assert tried == ["suppress", "warp"] and door.chosen == {"suppress": numba_loops.suppress}


def test_numba_starts_in_the_calling_thread_where_no_other_can(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    door = Door(lambda: "auto", lambda: numba_loops)
    door.prepare("suppress")
    assert door.run("suppress", BOXES, ORDER, 0.5).tolist() == [0]
    assert door.chosen == {"suppress": numba_loops.suppress}


# The program ends while its first loop is compiled.
ENDED = """
import threading
from types import SimpleNamespace
from batchverify.kernels.loops import Door
def try_out(name):
    print(name, flush=True)
    threading.main_thread().join()
Door(lambda: "auto", lambda: SimpleNamespace(try_out=try_out)).prepare("suppress", "warp")
"""


def test_a_program_that_ends_waits_for_one_loop_at_most(tmp_path):
    assert call(tmp_path, ENDED) == ["suppress"]


# A process is forked while another thread imports numba.
FORKED = """
import os, signal, threading
import numpy as np
from batchverify.kernels.loops import Door
begun, may_end = threading.Event(), threading.Event()
def slow_import():
    begun.set()
    may_end.wait()
door = Door(lambda: "auto", slow_import)
door.prepare("suppress")
begun.wait()
if not os.fork():
    signal.alarm(20)
    print(*door.run("suppress", np.ones((1, 4), np.float32), np.zeros(1, np.int64), 0.5), door.chosen, flush=True)
    os._exit(0)
print(os.wait()[1], flush=True)
os._exit(0)
"""


def test_a_process_that_is_forked_while_numba_starts_stays_with_numpy(tmp_path):
    assert call(tmp_path, FORKED) == ["0 {}", "0"]


@pytest.mark.parametrize("value", ["on", "off"])
def test_announced_work_changes_nothing_where_there_is_no_choice(value):
    door = Door(lambda: value, lambda: pytest.fail("imported"))
    door.prepare("suppress")
    assert not door.chosen and not door.spent


TRIED = """
import json
from batchverify.embedding.embedder import Embedder
from batchverify.faces.detectors import loops_of
from batchverify.kernels import numba_loops
from batchverify.kernels.loops import distances
from PIL import Image
import numpy as np
import sys

embedder = Embedder(sys.argv[1], device="cpu")
names = (*loops_of(embedder.settings), "distances")
for name in names:
    numba_loops.try_out(name)
before = {name: len(getattr(numba_loops, name).signatures) for name in names}
embedder.find_faces([np.asarray(Image.open(sys.argv[2]).convert("RGB"))])
distances(np.ones((3, 512), np.float16), np.ones((2, 512), np.float16), np.arange(2), np.arange(2))
loops = {name: each for name, each in vars(numba_loops).items() if hasattr(each, "py_func") and name[0] != "_"}
after = {name: len(each.signatures) for name, each in loops.items() if each.signatures}
print(json.dumps([before, after]))
"""


@pytest.mark.parametrize(
    ("backbone", "names"),
    [("compact", ("suppress", "warp")), ("vggface2", ("integrate", "resample", "suppress"))],
)
def test_loops_are_tried_out_with_the_types_that_they_are_used_with(backbone, names):
    """Otherwise they would be compiled a second time."""
    image = REPOSITORY / "sample_manifests" / "faces" / "ada_1.jpg"
    environment = {**os.environ, loops.VARIABLE: "on"}
    command = [sys.executable, "-c", TRIED, backbone, str(image)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    before, after = json.loads(output)
    assert before == after == dict.fromkeys([*names, "distances"], 1)


# Stands in for the package with which numba colours its messages.
COLORAMA = """
from types import SimpleNamespace
__version__, calls = "0.4.6", []
Fore = Style = SimpleNamespace(
    BLUE="", YELLOW="", WHITE="", GREEN="", RED="", BLACK="", MAGENTA="", CYAN="", BRIGHT="", RESET_ALL=""
)
init, reinit, deinit = (lambda name=name: calls.append(name) for name in ("init", "reinit", "deinit"))
"""


def test_the_start_of_numba_leaves_stdout_and_stderr_alone(tmp_path):
    """It happens in a thread, while a command may put something else in their places."""
    (tmp_path / "colorama.py").write_text(COLORAMA)
    program = "import colorama; from batchverify.kernels import loops; compiled = loops.door.compiled(); "
    program += "compiled.try_out('suppress'); print(compiled, colorama.calls)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", None)
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "numba_loops" in output and output.endswith(" []\n")
