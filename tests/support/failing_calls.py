"""Makes the n-th I/O call below a folder, or in an object store, fail; runs a command once for every n."""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from pyarrow import fs

from batchverify.cli.app import main
from batchverify.storage.location import Location

T = TypeVar("T")
# All n with all faults, which takes hours for all commands: `benchmarks/failing.py`. Without it some n, each with one
# of the faults.
EVERY = "BATCHVERIFY_EVERY_CALL"
# What befalls a call: an error of the system; `late`: the call is done, but reported as failed; `short`: fewer bytes
# are read or written than asked; `full`: no space from this call on.
DISK = ("EIO", "ENOSPC", "EACCES", "EINTR", "late", "short", "full")
# The same of an object store. `500` passes by itself, `outage` does not: every call from this one on gets it.
STORE = ("403", "500", "late", "outage")
STORE_ERRORS = {
    "403": "AWS Error ACCESS_DENIED during the operation: Access Denied (HTTP status 403)",
    "500": "AWS Error INTERNAL_FAILURE during the operation: Please try again (HTTP status 500)",
}
CHANGES = {"replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync", "delete", "move", "upload"}
NEEDS_SPACE = {"write", "pwrite", "mkdir", "fsync", "create"}
_PATHS = ("open", "stat", "scandir", "listdir", "mkdir", "rmdir", "unlink", "remove", "replace", "rename")
_DESCRIPTORS = ("fsync", "fstat", "pread", "pwrite")
_open = builtins.open


@dataclass
class FailingCalls:
    """Counts I/O calls below `folder`, which Python or pyarrow make, and lets call number `at` fail.

    stores: calls in object stores count, and no others. seen: the calls so far, as (name, path). hit: the one that
    failed. event: what happens elsewhere with the fault `event`, before the call, and with the fault `torn`, between
    the halves of what is read.
    """

    folder: str
    stores: bool = False
    at: int = -1
    fault: str = ""
    counting: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)
    hit: tuple[str, str] = ("", "")
    event: Callable[[], object] = lambda: None
    # The garbage collector may close a file, which is a call, while a call is counted.
    _lock: Any = field(default_factory=threading.RLock)

    @contextmanager
    def failing(self, at: int = -1, fault: str = "") -> Iterator[None]:
        """Calls count from 0; number `at` fails."""
        self.at, self.fault, self.seen, self.hit, self.counting = at, fault, [], ("", ""), True
        try:
            yield
        finally:
            self.counting = False

    def call(self, name: str, path: str | None, do: Callable[[], T]) -> T:
        """Do it, unless it is its turn to fail. path: None for a call that does not count."""
        fault = self._fault(name, path)
        if fault in ("event", "torn"):
            self.event()
            return do()
        if fault == "late":
            do()
        if fault in STORE_ERRORS:
            raise OSError(f"{STORE_ERRORS[fault]}: {path}")
        if fault:
            number = errno.EIO if fault == "late" else getattr(errno, fault)
            raise OSError(number, os.strerror(number), path)
        return do()

    def some(self, name: str, path: str, size: int) -> int:
        """How many bytes are read or written. Raises like `call`."""
        fault = self._fault(name, path)
        if fault == "event":
            self.event()
        if fault in ("", "event"):
            return size
        return max(1, size // 2) if fault in ("short", "torn") else self._raise(fault, path)

    def _raise(self, fault: str, path: str) -> int:
        number = errno.EIO if fault == "late" else getattr(errno, fault)
        raise OSError(number, os.strerror(number), path)

    def _fault(self, name: str, path: str | None) -> str:
        """What befalls this call; empty for nothing."""
        if path is None or not self.counting:
            return ""
        with self._lock:
            number = len(self.seen)
            self.seen.append((name, path))
            if number == self.at:
                self.hit = (name, path)
        if self.at < 0 or number < self.at:
            return ""
        if self.fault == "outage":
            return "500"
        if self.fault == "full":
            return "ENOSPC" if name in NEEDS_SPACE else ""
        if number != self.at:
            return ""
        if self.fault == "short":
            return "short" if name in ("read", "write") else ""
        return "EIO" if self.fault == "late" and name not in CHANGES and not self.stores else self.fault

    def below(self, file: Any) -> str | None:
        """The path of a file name or descriptor if it is below the folder."""
        if self.stores or not self.counting:
            return None
        if isinstance(file, int):
            try:
                path = str(Path(f"/proc/self/fd/{file}").readlink())
            except OSError:
                return None
        else:
            path = os.path.abspath(os.fsdecode(file))  # noqa: PTH100  lexical, without a call
        return path if path.startswith(self.folder + "/") else None

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        """`open`, whose calls of the system can fail one by one."""
        path = self.below(file)
        if path is None:
            return _open(file, mode, buffering, *more, **named)
        bare = mode.replace("b", "").replace("t", "")
        name = "open" if bare == "r" else "create"
        raw: Any = self.call(name, path, lambda: _RawFile(self, path, file, bare))
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in bare else io.BufferedReader if bare == "r" else io.BufferedWriter
        buffered = kind(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **named)

    def filesystem(self, location: Location, real: Any) -> Any:
        """The file system of a location whose calls can fail."""
        if self.counting and self.stores and not location.is_local:
            return fs.PyFileSystem(_Store(self, real))
        if self.counting and self.below(location.path) is not None:
            return fs.PyFileSystem(_Disk(self, real))
        return real


class _RawFile(io.FileIO):
    """A file without buffer: one call of the system for each call of a method."""

    def __init__(self, calls: FailingCalls, path: str, file: Any, mode: str) -> None:
        self._calls, self._path = calls, path
        super().__init__(file, mode)

    def read(self, size: int | None = -1) -> Any:
        if size is None or size < 0:
            return self.readall()
        return super().read(self._calls.some("read", self._path, size))

    def readall(self) -> Any:
        return io.RawIOBase.readall(self)

    def readinto(self, buffer: Any) -> Any:
        view = memoryview(buffer).cast("B")
        before = self._calls.hit
        count = super().readinto(view[: self._calls.some("read", self._path, len(view))])
        if self._calls.fault == "torn" and self._calls.hit != before:
            self._calls.event()
        return count

    def write(self, data: Any) -> Any:
        view = memoryview(data).cast("B")
        return super().write(view[: self._calls.some("write", self._path, len(view))])


class _Disk(fs.FileSystemHandler):
    """The local disk as pyarrow sees it, with calls that can fail."""

    def __init__(self, calls: FailingCalls, real: Any) -> None:
        self.calls, self.real = calls, real

    def _do(self, name: str, path: str, do: Callable[[], T]) -> T:
        return self.calls.call(name, path, do)

    def get_type_name(self) -> str:
        return "failing"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return [self._do("stat", path, partial(self.real.get_file_info, path)) for path in paths]

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._do("list", selector.base_dir, lambda: self.real.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do("mkdir", path, lambda: self.real.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._do("delete", path, lambda: self.real.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._do("delete", path, lambda: self.real.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._do("move", src, lambda: self.real.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        return pa.PythonFile(self.calls.open(path, "rb"), "r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(self.calls.open(path, "wb"), "w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


class _Store(_Disk):
    """An object store, where an object is read in pieces and written by one request at the end."""

    def open_input_file(self, path: str) -> Any:
        file = self._do("open", path, lambda: self.real.open_input_file(path))
        return pa.PythonFile(_Download(self.calls, path, file), "r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(self.calls, path, self.real), "w")


class _Download(io.RawIOBase):
    def __init__(self, calls: FailingCalls, path: str, file: Any) -> None:
        self._calls, self._path, self._file = calls, path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> Any:
        return self._calls.call(
            "read", self._path, lambda: self._file.read(None if size is None or size < 0 else size)
        )

    def seek(self, position: int, whence: int = 0) -> int:
        return int(self._file.seek(position, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Upload(io.BytesIO):
    def __init__(self, calls: FailingCalls, path: str, real: Any) -> None:
        super().__init__()
        self._calls, self._path, self._real = calls, path, real

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        self._calls.call("upload", self._path, lambda: self._put(data))

    def _put(self, data: bytes) -> None:
        with self._real.open_output_stream(self._path) as stream:
            stream.write(data)


@contextmanager
def failing_calls(folder: Path, *, stores: bool = False) -> Iterator[FailingCalls]:
    """Counts and fails calls below a folder, or those in object stores, while the block runs."""
    calls = FailingCalls(str(folder), stores)
    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", calls.open)
        for name in (*_PATHS, *_DESCRIPTORS):
            patch.setattr(os, name, _counted(calls, name, getattr(os, name)))
        patch.setattr(fcntl, "flock", _counted(calls, "flock", fcntl.flock))
        real = vars(Location)["filesystem"].fget
        patch.setattr(Location, "filesystem", property(lambda location: calls.filesystem(location, real(location))))
        yield calls


def _counted(calls: FailingCalls, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def counted(first: Any = ".", *more: Any, **named: Any) -> Any:
        by_descriptor = name in _PATHS and isinstance(first, int)
        if by_descriptor or named.get("dir_fd") is not None:
            return real(first, *more, **named)
        return calls.call(name, calls.below(first), lambda: real(first, *more, **named))

    return counted


class Bench:
    """A command that is run again and again in fresh folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def place(self) -> Path:
        """A new folder for one run."""
        self._count += 1
        place = self.folder / f"run-{self._count}"
        place.mkdir()
        self.furnish(place)
        return place

    def furnish(self, place: Path) -> None:
        """Put there what the command finds."""

    def arguments(self, place: Path) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def outcome(self, place: Path, result: Result) -> Any:
        """What a run leaves or says, to be compared."""
        raise NotImplementedError

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """Whether this fault may change the expected outcome of a run that ends with success."""
        return False

    def mend(self, place: Path, hit: tuple[str, str]) -> None:
        """What the user does beyond running the same command again, after such a fault."""

    def leftovers(self, place: Path) -> list[str]:
        """What should not be there after a success."""
        names = [str(path.relative_to(place)) for path in sorted(place.rglob("*"))]
        return [name for name in names if name.endswith((".tmp", ".job"))]

    def invoke(self, place: Path) -> Result:
        """Run the command."""
        return CliRunner().invoke(main, self.arguments(place))


# By number of the call and fault.
Kept = MutableMapping[tuple[int, str], tuple[int, list[str]]]


@dataclass
class Findings:
    """calls: of an undisturbed run, by name. runs: disturbed ones, by exit code. wrong: what went wrong."""

    calls: Counter[str] = field(default_factory=Counter)
    runs: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.calls.most_common())
        codes = ", ".join(f"{count} ended with {code}" for code, count in sorted(self.runs.items()))
        return f"{self.calls.total()} calls ({counts}); {self.runs.total()} runs: {codes}"


def applies(fault: str, name: str, *, stores: bool) -> bool:
    """Whether a fault does anything to a call of this name that no other fault or call shows."""
    if fault == "short":
        return name in ("read", "write")
    if fault == "full":
        return name in NEEDS_SPACE
    return fault != "late" or stores or name in CHANGES


def fail_every_call(
    bench: Bench, calls: FailingCalls, faults: tuple[str, ...], *, step: int = 1, kept: Kept | None = None
) -> Findings:
    """Run a command once for every call that it makes, which fails, and once more undisturbed.

    step: every how many calls. With the environment variable `EVERY` each fault at each call, but for those that do
    nothing there. kept: each run's exit code and what went wrong; runs that are there already are not made again.
    """
    kept = {} if kept is None else kept
    findings = Findings()
    place = bench.place()
    with calls.failing():
        result = bench.invoke(place)
    assert _problems(result) == [], result.output
    expected = bench.outcome(place, result)
    findings.calls = Counter(name for name, _ in calls.seen)
    everything = bool(os.environ.get(EVERY))
    names = [name for name, _ in calls.seen]
    for number in range(0, len(names), 1 if everything else step):
        fitting = [fault for fault in faults if applies(fault, names[number], stores=calls.stores)]
        for fault in fitting if everything else [fitting[number // step % len(fitting)]]:
            if (number, fault) not in kept:
                kept[number, fault] = _fail_one_call(bench, calls, number, fault, expected)
            code, wrong = kept[number, fault]
            findings.runs[code] += 1
            findings.wrong += wrong
    return findings


def _fail_one_call(
    bench: Bench, calls: FailingCalls, number: int, fault: str, expected: Any
) -> tuple[int, list[str]]:
    """The exit code of the disturbed run, and what went wrong in it or the one after it."""
    place = bench.place()
    with calls.failing(number, fault):
        result = bench.invoke(place)
    name, path = hit = calls.hit
    code, problems = result.exit_code, _problems(result)
    told = " | ".join(result.output.splitlines()[-2:])
    if result.exit_code == 0 and name:
        same = bench.outcome(place, result) == expected or bench.excuses(place, hit, result, expected)
        problems += [] if same else ["another outcome with exit code 0"]
    # Who cannot remove a file cannot help leaving it.
    cannot = name in ("unlink", "remove", "rmdir", "delete") or fault == "outage"
    found = [] if cannot else bench.leftovers(place)
    left = [each for each in found if each.endswith(".tmp") or result.exit_code == 0]
    problems += [f"left {left}"] if left else []
    if leaked := _open_files(str(place)):
        problems.append(f"still open: {leaked}")
    del result
    bench.mend(place, hit)
    again = bench.invoke(place)
    outcome = bench.outcome(place, again)
    if outcome != expected:
        problems.append(f"the second run ends with {again.exit_code}: {again.output[-300:]!r}")
    left = bench.leftovers(place)
    if left and not (cannot and all(Path(each).parent.name == "tmp" for each in left)):
        problems.append(f"left after the second run {left}")
    return code, [f"{fault} at call {number}, {name} {path}: {each} ({told})" for each in problems]


def _problems(result: Result) -> list[str]:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return [f"traceback of {result.exception!r}"]
    if result.exit_code not in (0, 1, 2, 3):
        return [f"exit code {result.exit_code}"]
    if result.exit_code and not re.search(r"/run-\d+\b|/in\b|s3://", result.output):
        return [f"a message that names no file: {result.output!r}"]
    return []


def _open_files(folder: str) -> list[str]:
    """Files below a folder that this process holds open."""

    def look() -> list[str]:
        names = []
        for link in Path("/proc/self/fd").iterdir():
            try:
                names.append(str(link.readlink()))
            except OSError:
                continue
        return [name for name in names if name.startswith(folder + "/")]

    if not look():
        return []
    gc.collect()
    return look()
