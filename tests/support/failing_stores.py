"""Small commands on an object store, whose calls fail one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from cache_samples import FINGERPRINT, entry, failure, key, new_cache, values
from click.testing import CliRunner, Result
from failing_benches import COMMON, ScoreBench
from failing_calls import Bench
from failing_commands import EvaluateBench, RewritingBench, TrainBench, without_seconds
from object_store import Store, impatience, object_store

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.maintenance import verify_cache
from batchverify.cli.app import main
from batchverify.storage import claim
from batchverify.storage.location import Location

BUCKET = "calls"


@contextmanager
def failing_store(folder: Path) -> Iterator[Store]:
    """A store that is given up at once; the machine's temporary folder is below `folder` meanwhile."""
    temporary = folder / "temporary"
    temporary.mkdir()
    with object_store() as store, impatience(attempts=1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        # Nobody else wants the folders; twice the pause is most of a run.
        patch.setattr(claim, "SETTLE_SECONDS", 0.02)
        store.client().create_bucket(Bucket=BUCKET)
        yield store


class InStore(Bench):
    """What benches on a store have in common. store: set before anything is run."""

    store: Store

    @cached_property
    def client(self) -> Any:
        """One for all runs: making one takes longer than a request."""
        return self.store.client()

    def uri(self, place: Path, name: str) -> str:
        """Of something in the bucket, behind the run's prefix."""
        return f"s3://{BUCKET}/{self.folder.name}/{place.name}/{name}{self.store.options(self.store.direct)}"

    def names(self, place: Path) -> list[str]:
        """Everything that a run has in the bucket, without the prefix."""
        prefix = f"{self.folder.name}/{place.name}/"
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [each["Key"].removeprefix(prefix) for each in listed]

    def content(self, place: Path, name: str) -> bytes:
        """The bytes of an object."""
        path = f"{self.folder.name}/{place.name}/{name}"
        return self.client.get_object(Bucket=BUCKET, Key=path)["Body"].read()

    def upload_inputs(self, place: Path) -> None:
        """Put the files of the input folder below `in/` of a run."""
        for path in (self.folder / "in").iterdir():
            self.client.upload_file(str(path), BUCKET, f"{self.folder.name}/{place.name}/in/{path.name}")

    def leftovers(self, place: Path) -> list[str]:
        """See `Bench`. What could not be sent is kept on this machine, but for parts that are sent again."""
        names = [*self.names(place), *(path.name for path in self._unsent())]
        useless = [name for name in names if any(each in name for each in (".tmp", ".job/", "claim-"))]
        # The marker of an empty folder hinders nobody.
        return [name for name in useless if not name.endswith(".job/")]

    def _unsent(self) -> list[Path]:
        return [path for path in Path(tempfile.gettempdir()).iterdir() if path.suffix]


class StoreBench(InStore, ScoreBench):
    """`score` with cache and output in the store."""

    def arguments(self, place: Path) -> list[str]:
        """See `Bench`."""
        arguments = super().arguments(place)
        names = {str(place / "cache"): "cache", str(place / "out" / self.name): f"out/{self.name}"}
        return [self.uri(place, names[each]) if each in names else each for each in arguments]

    def outcome(self, place: Path, result: Result) -> Any:
        """The rows, and whether the cache is whole."""
        output = Location.parse(self.uri(place, f"out/{self.name}"))
        rows = []
        for file, _ in output.parent.files() if output.suffix else output.files():
            if file.suffix == ".parquet":
                with file.filesystem.open_input_file(file.path) as source:
                    rows += pq.ParquetFile(source).read().to_pylist()
        done = bool(output.suffix) or output.join("_SUCCESS").kind() == "file"
        report = verify_cache(self.uri(place, "cache"))
        return result.exit_code, rows if done else None, report.ok, report.foreign

    def leftovers(self, place: Path) -> list[str]:
        """See `InStore`; parts of one file, kept because they could not be sent, are sent again, too."""
        parts = [] if self.name == "folder" else [path.name for path in self._unsent()]
        return [*super().leftovers(place), *(name for name in parts if "-part-0" in name)]


class StoreInputBench(InStore, ScoreBench):
    """`score` of a manifest and images in the store."""

    blamed = ("unreadable", "forbidden")

    def furnish(self, place: Path) -> None:
        """See `Bench`."""
        self.upload_inputs(place)

    def arguments(self, place: Path) -> list[str]:
        """See `Bench`."""
        manifest = self.uri(place, f"in/{self.manifest.name}")
        return [manifest if each == str(self.manifest) else each for each in super().arguments(place)]


class StoreCacheBench(InStore, RewritingBench):
    """A `cache` command on a cache in the store."""

    def furnish(self, place: Path) -> None:
        """See `RewritingBench`."""
        for number in range(4):
            self._commit(place, [entry(number), entry(number + 10)])
        self._commit(place, [failure(20)])

    def _commit(self, place: Path, entries: list[Any]) -> None:
        cache = new_cache(self.uri(place, "cache"))
        cache.append(entries)
        cache.commit()

    def arguments(self, place: Path) -> list[str]:
        """See `Bench`."""
        cache = str(place / "cache")
        return [self.uri(place, "cache") if each == cache else each for each in super().arguments(place)]

    def outcome(self, place: Path, result: Result) -> Any:
        """As on a disk."""
        numbers = (*range(4), *range(10, 14), 20)
        reader = EmbeddingCache(self.uri(place, "cache"), FINGERPRINT)
        answers = values(reader.get_many([key(each) for each in numbers]))
        names = self.names(place)
        named = [name for name in names if key(1) in self.content(place, name)]
        merged = [name for name in names if name.endswith(".parquet")]
        left = len(merged) if "compact" in self.command else 0
        return result.exit_code, answers, left, len(named)


class StoreTrainBench(InStore, TrainBench):
    """`train` with cache and head in the store."""

    def arguments(self, place: Path) -> list[str]:
        """See `Bench`."""
        names = {str(place / "head.safetensors"): "head.safetensors", str(place / "cache"): "cache"}
        return [self.uri(place, names[each]) if each in names else each for each in super().arguments(place)]

    def outcome(self, place: Path, result: Result) -> Any:
        """The head's bytes."""
        names, head = self.names(place), "head.safetensors"
        weights = self.content(place, head) if head in names else b""
        return result.exit_code, weights, "head.training.json" in names


class StoreTrainInputBench(InStore, TrainBench):
    """`train` of manifests and images in the store; the head goes to a disk."""

    def furnish(self, place: Path) -> None:
        """See `Bench`."""
        self.upload_inputs(place)

    def arguments(self, place: Path) -> list[str]:
        """See `Bench`."""
        names = {str(self.folder / "in" / name): f"in/{name}" for name in ("train.csv", "dev.csv")}
        return [self.uri(place, names[each]) if each in names else each for each in super().arguments(place)]


class StoreEvaluateBench(InStore, EvaluateBench):
    """`evaluate` with scores, images, cache, report and lists in the store."""

    inputs = Path("evaluated")

    def furnish(self, place: Path) -> None:
        """The inputs are the same in all runs: their names are in the report."""
        if self.names(self.inputs):
            return
        self.upload_inputs(self.inputs)
        where = ["-o", self.uri(self.inputs, "scores.parquet"), "--cache", self.uri(self.inputs, "cache")]
        result = CliRunner().invoke(main, ["score", self.uri(self.inputs, "in/pairs.csv"), *where, *COMMON])
        assert result.exit_code == 0, result.output

    def arguments(self, place: Path) -> list[str]:
        """See `Bench`. URIs of the run record choose no server, so root and cache are given."""
        names = {str(place / name): name for name in ("worst.csv", "suspects.csv", "report")}
        changed = [self.uri(place, names[each]) if each in names else each for each in super().arguments(place)]
        changed = [self.uri(self.inputs, "scores.parquet") if each == str(self.scores) else each for each in changed]
        return [*changed, "--image-root", self.uri(self.inputs, "in"), "--cache", self.uri(self.inputs, "cache")]

    def outcome(self, place: Path, result: Result) -> Any:
        """The bytes of all files, but for the seconds that it took."""
        names = self.names(place)
        return result.exit_code, names, [without_seconds(self.content(place, name)) for name in names]

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """Without an image or the cache, the report shows less, and suspects are found by the scores alone."""
        optional = hit[1].endswith(".png") or "/cache/" in hit[1]
        return optional and self.names(place) == expected[1]

    def mend(self, place: Path, hit: tuple[str, str]) -> None:
        """See `EvaluateBench`."""
        for name in ("worst.csv", "suspects.csv"):
            self.client.delete_object(Bucket=BUCKET, Key=f"{self.folder.name}/{place.name}/{name}")


# Benches by what they run, in a folder of their own.
IN_STORE: dict[str, Callable[[Path], InStore]] = {
    "score, one file": partial(StoreBench, name="one.parquet"),
    "score, a folder": partial(StoreBench, name="folder"),
    "score, manifest and images": partial(StoreInputBench, name="one.parquet"),
    **{f"cache {command}": partial(StoreCacheBench, command=(command,)) for command in ("info", "verify", "compact")},
    "cache forget": partial(StoreCacheBench, command=("forget", "--key", key(1).hex())),
    "train": StoreTrainBench,
    "train, manifests and images": StoreTrainInputBench,
    "evaluate": StoreEvaluateBench,
}


def store_bench(folder: Path, name: str, store: Store) -> InStore:
    """A bench of `IN_STORE`."""
    bench = IN_STORE[name](folder)
    bench.store = store
    return bench
