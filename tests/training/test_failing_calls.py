"""Every I/O call of `train` fails once: an error of one line or success, and the same command then does the rest."""

from itertools import combinations
from pathlib import Path
from typing import Any

from click.testing import Result
from failing_benches import COMMON, draw_people, toy_embedder, write_pairs
from failing_calls import DISK, Bench, fail_every_call, failing_calls


class TrainBench(Bench):
    """`train` on all pairs of five people, with those of three others as dev set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = draw_people(folder / "in")
        for which, chosen in (("train", names[:15]), ("dev", names[15:])):
            pairs = [(a, b, int(a[0] != b[0])) for a, b in combinations(chosen, 2)]
            write_pairs(folder / "in" / f"{which}.csv", pairs, "image_a,image_b,label")

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


def test_any_call_of_a_training_may_fail(tmp_path: Path) -> None:
    with toy_embedder(tmp_path.parent / "toy.log"), failing_calls(tmp_path) as calls:
        findings = fail_every_call(TrainBench(tmp_path), calls, DISK, step=20)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
