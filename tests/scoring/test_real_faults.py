"""Full disks, folders of somebody else, and images that vanish or change while a job reads them."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from failing_benches import ScoreBench, rows_of, toy_embedder
from failing_calls import FailingCalls, failing_calls
from killing import KilledJob, draw_pairs
from PIL import Image
from repository import REPOSITORY

PAGE = 4096
NOBODY = 65534


@pytest.fixture(autouse=True)
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_embedder(tmp_path_factory.mktemp("toy") / "log"):
        yield


@contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[None]:
    """A disk of so many pages at `folder`; skips where none can be mounted."""
    folder.mkdir(parents=True)
    options = f"size={pages * PAGE},mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no program `mount`")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def temporary_files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.suffix == ".tmp"]


def finish(bench: ScoreBench, place: Path) -> list[dict]:
    """The rows of the same command, now undisturbed, which leaves nothing but output and cache."""
    result = bench.invoke(place)
    assert result.exit_code == 0, result.output
    assert temporary_files(place) == []
    assert [path.name for path in (place / "out").iterdir()] == [bench.name]
    return rows_of(place / "out" / bench.name).to_pylist()


@pytest.mark.parametrize("name", ["one.parquet", "folder"])
@pytest.mark.parametrize("full", ["out", "cache"])
def test_a_disk_that_fills_up_at_any_page(tmp_path: Path, name: str, full: str) -> None:
    bench = ScoreBench(tmp_path, name)
    expected, stopped = finish(bench, bench.place()), 0
    for pages in range(2, 60):
        place = bench.place()
        with small_disk(place / full, pages):
            result = bench.invoke(place)
            assert result.exit_code == 0 or "No space left" in result.output, result.output
            assert result.exit_code == 0 or str(place / full) in result.output
            assert isinstance(result.exception, SystemExit | None), result.output
            assert temporary_files(place) == []
            stopped += result.exit_code != 0
            subprocess.run(["mount", "-o", "remount,size=9M", str(place / full)], check=True)
            assert finish(bench, place) == expected
        if result.exit_code == 0:
            break
    assert stopped > 1 and result.exit_code == 0


@pytest.mark.parametrize("name", ["one.parquet", "folder"])
def test_files_that_may_not_grow(tmp_path: Path, name: str) -> None:
    bench = ScoreBench(tmp_path, name)
    expected = finish(bench, bench.place())
    for size in (0, 100, 700, 3000, 6000):
        place = bench.place()
        with limited_files(size):
            result = bench.invoke(place)
        assert result.exit_code in (1, 2) and "File too large" in result.output, result.output
        assert str(place) in result.output
        assert temporary_files(place) == []
        assert finish(bench, place) == expected


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder below which everybody may be let in; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user to whom nothing belongs; root may do everything."""
    if os.getuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def close(place: Path, mode: int = 0o555) -> None:
    """Only read permission for all."""
    for path in (place, *place.rglob("*")):
        path.chmod(mode if path.is_dir() else 0o444)


def writable(place: Path) -> Path:
    place.mkdir(exist_ok=True)
    place.chmod(0o777)
    return place


def test_a_cache_that_may_only_be_read_serves_what_it_holds(open_folder: Path) -> None:
    bench = ScoreBench(open_folder, "one.parquet")
    place = bench.place()
    expected = finish(bench, place)
    (place / "out" / bench.name).unlink()
    close(place / "cache")
    writable(place / "out")
    with nobody():
        assert finish(bench, place) == expected


def test_a_cache_that_may_only_be_read_and_lacks_images_is_named(open_folder: Path) -> None:
    bench = ScoreBench(open_folder, "one.parquet", "--limit", "2")
    place = bench.place()
    finish(bench, place)
    writable(place / "out")
    bench.options = ("--overwrite",)
    for cache in (place / "cache", place / "cache" / "v1"):
        close(cache)
        with nobody():
            result = bench.invoke(place)
        assert result.exit_code == 2 and "Permission denied" in result.output, result.output
        assert f"{place / 'cache'}: the cache cannot be used" in result.output
        assert "--no-cache" in result.output
    assert [path.name for path in (place / "out").iterdir()] == [bench.name]


@pytest.mark.parametrize("name", ["one.parquet", "folder"])
def test_outputs_that_may_not_be_read_or_written_are_not_taken_for_others(open_folder: Path, name: str) -> None:
    bench = ScoreBench(open_folder, name)
    # What is imported now need not be readable for others.
    finish(bench, bench.place())
    place = bench.place()
    writable(place / "cache")
    place.joinpath("out").mkdir(mode=0o755)
    with nobody():
        result = bench.invoke(place)
    assert result.exit_code == 2 and "cannot be written" in result.output, result.output
    assert list((place / "out").iterdir()) == []
    (place / "cache").rename(place / "old")
    finish(bench, place)
    for path in (place / "out").rglob("*"):
        path.chmod(0)
    with nobody():
        result = bench.invoke(place)
    assert result.exit_code in (1, 2) and "Permission denied" in result.output, result.output
    assert "not written by batchverify" not in result.output


def test_images_that_may_not_be_read_are_rows(open_folder: Path) -> None:
    bench = ScoreBench(open_folder, "one.parquet")
    finish(bench, bench.place())
    place = bench.place()
    writable(place)
    image = open_folder / "in" / "0_0.png"
    image.chmod(0)
    with toy_embedder(place / "log"), nobody():
        assert bench.invoke(place).exit_code == 0
    rows = rows_of(place / "out" / bench.name).to_pylist()
    assert {row["status"] for row in rows if image.name == row["image_a"]} == {"unreadable"}


OLD, NEW = (200, 40, 40), (40, 40, 200)


def bitmap(path: Path, colour: tuple[int, int, int]) -> None:
    """An image without compression, in place: every half of it can be decoded."""
    image = Image.fromarray(np.full((160, 160, 3), colour, np.uint8))
    with path.open("r+b" if path.exists() else "wb") as file:
        image.save(file, "BMP")


def replace(path: Path) -> None:
    """Another image under the same name."""
    other = path.with_name("other")
    other.unlink(missing_ok=True)
    bitmap(other, NEW)
    other.replace(path)


def overwrite(path: Path) -> None:
    bitmap(path, NEW)


class ChangingBench(ScoreBench):
    """An image of which there are two versions."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "one.parquet")
        self.image = folder / "in" / "0_0.png"

    def restore(self) -> None:
        """The old version, written a while ago."""
        self.image.unlink(missing_ok=True)
        bitmap(self.image, OLD)
        os.utime(self.image, (1e9, 1e9))

    def own(self, place: Path) -> list[dict]:
        """The rows with the image."""
        rows = rows_of(place / "out" / self.name).to_pylist()
        return [row for row in rows if self.image.name in (row["image_a"], row["image_b"])]


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("event", Path.unlink),
        ("event", replace),
        ("event", overwrite),
        ("torn", overwrite),
        ("torn", replace),
        ("torn", lambda path: os.truncate(path, 500)),
    ],
)
def test_a_row_never_speaks_of_an_image_that_was_never_on_disk(
    tmp_path: Path, fault: str, change: Callable[[Path], object]
) -> None:
    bench = ChangingBench(tmp_path)
    bench.restore()
    with failing_calls(tmp_path) as calls:
        expected = finish(bench, old := bench.place())
        numbers = seen(bench, calls)
        overwrite(bench.image)
        finish(bench, new := bench.place())
        versions = [bench.own(old), bench.own(new)]
        for number in numbers:
            bench.restore()
            place = bench.place()
            calls.event = lambda: change(bench.image)
            with calls.failing(number, fault):
                result = bench.invoke(place)
            assert calls.hit[1] == str(bench.image)
            assert result.exit_code == 0, result.output
            own = bench.own(place)
            assert own in versions or all(row["status"] != "ok" for row in own), (fault, number, own)
            # What the cache holds now is true of the images that were read.
            bench.restore()
            (place / "out" / bench.name).unlink()
            assert finish(bench, place) == expected


def seen(bench: ChangingBench, calls: FailingCalls) -> list[int]:
    """The numbers of the calls that concern the image, in an undisturbed run."""
    place = bench.place()
    with calls.failing():
        bench.invoke(place)
    return [number for number, (_, path) in enumerate(calls.seen) if path == str(bench.image)]


@pytest.mark.parametrize("name", ["one.parquet", "folder"])
def test_files_are_on_the_disk_before_they_have_their_names(tmp_path: Path, name: str) -> None:
    """Otherwise a power cut leaves a whole name and half a file."""
    bench = ScoreBench(tmp_path, name)
    with failing_calls(tmp_path) as calls, calls.failing():
        assert bench.invoke(bench.place()).exit_code == 0
    renamed = [number for number, (call, _) in enumerate(calls.seen) if call in ("replace", "rename")]
    # Parts and the output, segments of vectors and failures, the fingerprint, job.json.
    assert len(renamed) >= (8 if name == "one.parquet" else 7)
    for number in renamed:
        synced = [path for call, path in calls.seen[:number] if call == "fsync"]
        assert calls.seen[number][1] in synced, calls.seen[number]
        # The name, too.
        assert "fsync" in [call for call, _ in calls.seen[number + 1 : number + 4]], calls.seen[number : number + 4]


# A /dev/shm of its own, which another program has filled to the last byte.
FULL_SHM = """
mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 77
head -c 64M /dev/zero > /dev/shm/filled
exec "$@"
"""


@pytest.mark.ray
def test_a_full_dev_shm_costs_ray_no_row(tmp_path: Path) -> None:
    manifest = str(REPOSITORY / "sample_manifests" / "faces.csv")
    arguments = ["score", manifest, "-o", "o.parquet", "--no-cache", "--crop", "center", "--limit", "4"]
    command = [sys.executable, "-m", "batchverify.cli", *arguments, "--engine", "ray", "--num-cpus", "1"]
    try:
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", FULL_SHM, "bash", *command],
            cwd=tmp_path, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no program `unshare`")
    if done.returncode in (1, 77) and "batchverify" not in done.stderr and not (tmp_path / "o.parquet").exists():
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows_of(tmp_path / "o.parquet").to_pylist()] == ["ok"] * 4


# The same, filled once Ray keeps images there.
FILLING_SHM = """
mount -t tmpfs -o size=200m tmpfs /dev/shm || exit 77
"$@" &
until [ "$(df --output=used /dev/shm | tail -n 1)" -gt 1000 ] || ! kill -0 $!; do sleep 0.01; done
head -c 200M /dev/zero > /dev/shm/filled
wait $!
"""


@pytest.mark.ray
def test_a_dev_shm_that_fills_up_costs_ray_no_row_and_no_end_without_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    manifest = draw_pairs(tmp_path / "in", 200, 1000)
    job = KilledJob(manifest, tmp_path / "out.parquet", tmp_path / "cache", 500, engine="ray", toy=0.3)
    environment = {**job.environment(), "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000"}
    try:
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", FILLING_SHM, "bash", *job.command()],
            capture_output=True, text=True, timeout=250, env=environment,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no program `unshare`")
    if done.returncode in (1, 77) and "aylet" not in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    # A run whose images all lie there already survives.
    assert done.returncode in (0, 1), done.stderr
    if done.returncode:
        [said] = [line for line in done.stderr.splitlines() if line.startswith("batchverify: ")]
        assert "the local Ray ended in the middle of the run: /dev/shm, where it keeps images" in said
    # Threads finish what Ray began: how a job is taken up does not depend on who began it.
    job.engine = "local"
    job.finish()
    undisturbed = KilledJob(manifest, tmp_path / "other.parquet", tmp_path / "other", 500, toy=0.0)
    undisturbed.finish()
    assert pa.concat_tables(job.table()).equals(pa.concat_tables(undisturbed.table()))
    assert job.embedded_twice() == 0


def test_a_folder_is_unfinished_before_its_first_part_is_replaced(tmp_path: Path) -> None:
    bench = ScoreBench(tmp_path, "folder")
    place = bench.place()
    finish(bench, place)
    bench.options = ("--retry-failed",)
    with failing_calls(tmp_path) as calls, calls.failing():
        assert bench.invoke(place).exit_code == 0
    removed = [number for number, (call, path) in enumerate(calls.seen) if call == "delete" and "_SUCCESS" in path]
    replaced = [number for number, (call, path) in enumerate(calls.seen) if call == "replace" and ".part-" in path]
    assert removed[0] < replaced[0], calls.seen
