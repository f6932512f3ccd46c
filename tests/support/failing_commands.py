"""Small commands beside `score`, to be run hundreds of times with failing calls."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from cache_samples import FINGERPRINT, entry, failure, flip, key, segments, values, write
from click.testing import CliRunner, Result
from failing_benches import COMMON, draw_people, write_pairs
from failing_calls import Bench
from train_samples import DEV, FACES, TRAIN

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cli.app import main


class CacheBench(Bench):
    """A `cache` command on a cache of three segments, one of which is damaged."""

    def __init__(self, folder: Path, command: tuple[str, ...]) -> None:
        super().__init__(folder)
        self.command = command

    def furnish(self, place: Path) -> None:
        cache = place / "cache"
        write(cache, [entry(1), entry(2), failure(3)])
        [damaged] = write(cache, [entry(4)])
        flip(damaged, 200)

    def arguments(self, place: Path) -> list[str]:
        return ["cache", *self.command, "--cache", str(place / "cache"), "--json"]

    def outcome(self, place: Path, result: Result) -> Any:
        """How many segments lie where, and the figures of the report."""
        kept, moved = len(segments(place)), len(list(place.glob("cache/v1/*/quarantine/*")))
        if "--quarantine" in self.command:
            return len(segments(place / "cache")), moved
        said = json.loads(result.stdout) if result.stdout.startswith("{") else {}
        report = said.get("fingerprints", [said])
        report = report if isinstance(report, list) else [said]
        keys = ("keys", "vectors", "segments", "rows", "ok")
        return result.exit_code, kept, [[each.get(key) for key in keys] for each in report]

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """A segment that cannot be read is named."""
        return hit[1] in result.stdout


class RewritingBench(Bench):
    """`forget` or `compact` on a cache of five small segments."""

    def __init__(self, folder: Path, command: tuple[str, ...]) -> None:
        super().__init__(folder)
        self.command = command

    def furnish(self, place: Path) -> None:
        for number in range(4):
            write(place / "cache", [entry(number), entry(number + 10)])
        write(place / "cache", [failure(20)])

    def arguments(self, place: Path) -> list[str]:
        return ["cache", *self.command, "--cache", str(place / "cache"), "--json"]

    def outcome(self, place: Path, result: Result) -> Any:
        """What the cache answers, and in how many files a forgotten image is named.

        A rewritten segment may lie beside the old one: a row is there twice until the next compaction.
        """
        numbers = (*range(4), *range(10, 14), 20)
        answers = EmbeddingCache(str(place / "cache"), FINGERPRINT).get_many([key(each) for each in numbers])
        named = [path for path in place.rglob("*") if path.is_file() and key(1) in path.read_bytes()]
        left = len(segments(place / "cache")) if "compact" in self.command else 0
        return result.exit_code, values(answers), left, len(named)


def labelled(names: list[str]) -> list[tuple[Any, ...]]:
    """All pairs of images named PERSON_NUMBER.png, with a label."""
    return [(a, b, int(a[0] != b[0])) for a, b in combinations(names, 2)]


class TrainBench(Bench):
    """`train` on all pairs of five people, with those of three others as dev set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = draw_people(folder / "in")
        for which, chosen in (("train", names[:15]), ("dev", names[15:])):
            write_pairs(folder / "in" / f"{which}.csv", labelled(chosen), "image_a,image_b,label")

    def arguments(self, place: Path) -> list[str]:
        manifests = [str(self.folder / "in" / "train.csv"), "--dev", str(self.folder / "in" / "dev.csv")]
        where = ["-o", str(place / "head.safetensors"), "--cache", str(place / "cache")]
        return ["train", *manifests, *where, *COMMON, "--folds", "2"]

    def outcome(self, place: Path, result: Result) -> Any:
        """The head's bytes."""
        head, record = place / "head.safetensors", place / "head.training.json"
        return result.exit_code, head.read_bytes() if head.exists() else b"", record.exists()

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """Pairs with an image that could not be read are left out."""
        return hit[1].endswith(".png")


class CalibrateBench(TrainBench):
    """`calibrate` of the head of `TrainBench` on pairs of three other people."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        first = folder / "first"
        first.mkdir()
        assert CliRunner().invoke(main, super().arguments(first)).exit_code == 0
        for name in ("head.safetensors", "head.training.json"):
            shutil.copy(first / name, folder / "in" / name)

    def arguments(self, place: Path) -> list[str]:
        inputs = [
            str(self.folder / "in" / "head.safetensors"),
            "--labelled",
            str(self.folder / "in" / "dev.csv"),
        ]
        where = ["-o", str(place / "head.safetensors"), "--cache", str(place / "cache")]
        return ["calibrate", *inputs, *where, *COMMON]

    def outcome(self, place: Path, result: Result) -> Any:
        """The head's bytes."""
        head = place / "head.safetensors"
        return result.exit_code, head.read_bytes() if head.exists() else b""


class EvaluateBench(Bench):
    """`evaluate` of 28 labelled pairs, with images in the report, its table and both lists of pairs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = draw_people(folder / "in")
        manifest = write_pairs(folder / "in" / "pairs.csv", labelled(names[::3]), "image_a,image_b,label")
        self.scores = folder / "in" / "scores.parquet"
        arguments = ["score", str(manifest), "-o", str(self.scores), "--no-cache", *COMMON]
        assert CliRunner().invoke(main, arguments).exit_code == 0

    def arguments(self, place: Path) -> list[str]:
        lists = [
            "--export-worst",
            "3",
            str(place / "worst.csv"),
            "--suspects",
            "3",
            str(place / "suspects.csv"),
        ]
        return [
            "evaluate",
            str(self.scores),
            "-o",
            str(place / "report"),
            "--tables",
            "--draws",
            "40",
            *lists,
        ]

    def outcome(self, place: Path, result: Result) -> Any:
        """The bytes of all files, but for the seconds that it took."""
        files = sorted(path for path in place.rglob("*") if path.is_file())
        contents = [without_seconds(path.read_bytes()) for path in files]
        return result.exit_code, [path.name for path in files], contents

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """The report shows no image that could not be read."""
        return hit[1].endswith(".png") and self.outcome(place, result)[1] == expected[1]

    def mend(self, place: Path, hit: tuple[str, str]) -> None:
        """Lists of pairs are new files: one that was written, but reported as failed, has to be removed."""
        for name in ("worst.csv", "suspects.csv"):
            (place / name).unlink(missing_ok=True)


def without_seconds(content: bytes) -> bytes:
    """A report or its figures without how long they took."""
    return re.sub(rb'"seconds": [0-9.]+', b"", content)


class PrepareBench(Bench):
    """`prepare folders` of eight people."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in draw_people(folder / "drawn"):
            target = folder / "in" / f"person {name[0]}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / "drawn" / name).rename(target)

    def arguments(self, place: Path) -> list[str]:
        return ["prepare", "folders", str(self.folder / "in"), "-o", str(place / "out")]

    def outcome(self, place: Path, result: Result) -> Any:
        """The manifests' bytes."""
        return result.exit_code, {path.name: path.read_bytes() for path in sorted(place.glob("out/*"))}


class FinetuneBench(Bench):
    """`finetune` of the last layer of `compact` on the drawn faces, one epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "in").mkdir()
        for name, numbers in (("train", (1, 2)), ("dev", (3,))):
            _couples(numbers, name).to_csv(folder / "in" / f"{name}.csv", index=False)

    def arguments(self, place: Path) -> list[str]:
        manifests = [str(self.folder / "in" / "train.csv"), "--dev", str(self.folder / "in" / "dev.csv")]
        where = ["-o", str(place / "tuned.safetensors"), "--no-cache", "--device", "cpu", "-q"]
        what = ["--backbone", "compact", "--unfreeze", "embedding", "--augment", "0", "--loss", "pair"]
        how = ["--epochs", "1", "--max-lr", "0.003", "--batch-images", "16"]
        return ["finetune", *manifests, *where, *what, *how]

    def outcome(self, place: Path, result: Result) -> Any:
        """The weights' bytes, and which files there are."""
        weights = place / "tuned.safetensors"
        names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
        return result.exit_code, weights.read_bytes() if weights.exists() else b"", names

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """The folder of faces may be left where it cannot be deleted, of which a warning tells."""
        data = place / "tuned.safetensors.job" / "data"
        return hit[1].startswith(str(data)) and self.outcome(place, result)[:2] == expected[:2]

    def leftovers(self, place: Path) -> list[str]:
        """See `Bench`; `outcome` has them."""
        return []


def _couples(numbers: tuple[int, ...], prefix: str) -> pd.DataFrame:
    """All pairs of some of the drawn images, where every two people count as one, which has to be learned."""
    images = [
        (f"{prefix}{place // 2}", str(FACES / f"{person}_{number}.jpg"))
        for number in numbers
        for place, person in enumerate((*TRAIN, *DEV))
    ]
    rows = [(a, b, int(p != q), p, q) for (p, a), (q, b) in combinations(images, 2)]
    return pd.DataFrame(rows, columns=["image_a", "image_b", "label", "person_a", "person_b"])


# Benches by what they run, in a folder of their own.
COMMANDS: dict[str, Callable[[Path], Bench]] = {
    **{
        f"cache {' '.join(command)}": partial(CacheBench, command=command)
        for command in (("info",), ("verify",), ("verify", "--quarantine"))
    },
    "cache compact": partial(RewritingBench, command=("compact",)),
    "cache forget": partial(RewritingBench, command=("forget", "--key", key(1).hex())),
    "train": TrainBench,
    "calibrate": CalibrateBench,
    "evaluate": EvaluateBench,
    "prepare": PrepareBench,
    "finetune": FinetuneBench,
}
