"""What each feature, head and crop is worth on LFW View 1: `python benchmarks/heads.py ROOT [--record]`.

Trains on the 2,048 training pairs, five seeds for distances and the default network, one for the rest, and
measures dev and test at the threshold chosen without the test set. Embeddings come from the usual cache.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lfw import SETTINGS
from results import publish, table

from batchverify.heads.features import FEATURES
from batchverify.manifest.prepare import prepare_lfw
from batchverify.options import TrainOptions
from batchverify.scoring.job import Job
from batchverify.scoring.score import embed_job
from batchverify.training.fit import fit_head
from batchverify.training.fuse import measure_heads
from batchverify.training.pairs import LabelledPairs

COMBINATIONS = ("chi2+product", "absdiff+product", "chi2+cosine")
ENSEMBLES = (("distance", "logistic"), ("distance", "logistic", "network"))
HEADER = ["crop", "head", "parameters", "held-out log loss", "above the best by", "dev F1", "dev AUC"]
HEADER += ["test AUC", "test F1", "best possible F1", "test accuracy", "test Brier", "test ECE", "seconds"]


def recipes() -> Iterator[tuple[tuple[str, ...], int, dict]]:
    """(algorithms, seeds, changes of the options) of every row."""
    terms = [name for name, feature in FEATURES.items() if feature.columns]
    for name, feature in FEATURES.items():
        if not feature.columns:
            yield (f"distance:{name}",), 5, {}
    yield ("weighted-chi2",), 1, {}
    for name in (*terms, *COMBINATIONS):
        yield (f"logistic:{name}",), 1, {}
    for name in (*terms, *COMBINATIONS):
        yield (f"network:{name}",), 5 if name == "absdiff" else 1, {}
    yield ("network",), 1, {"snapshots": 5}
    for names in ENSEMBLES:
        yield names, 1, {}


@dataclass(frozen=True)
class Row:
    """One spec on one crop: means over its seeds; losses: (N,) held-out log loss of each pair, first seed."""

    cells: list[str]
    numbers: int
    losses: np.ndarray

    def finished(self, best: np.ndarray) -> list[str]:
        """The cells with how far the loss lies above the best's, in standard errors of the paired difference."""
        gap = self.losses - best
        error = gap.std() / len(gap) ** 0.5
        above = f"{gap.mean():.4f} ({gap.mean() / error:.1f} SE)" if error else "the best"
        return [*self.cells[:3], f"{self.losses.mean():.4f}", above, *self.cells[3:]]


def measured(crop: dict, pairs: dict[str, LabelledPairs], job: Job, spec: tuple) -> Row:
    """Fit with each seed and measure."""
    algorithms, seeds, changes = spec
    options = TrainOptions(algorithms=algorithms, **changes)
    found, losses = [], []
    for seed in range(seeds):
        started = time.perf_counter()
        fitted = fit_head(pairs["train"], pairs["dev"], job.fingerprint, replace(options, seed=seed))
        seconds = time.perf_counter() - started
        dev, test = (measure_heads(fitted.head, [pairs[name]]) for name in ("dev", "test"))
        found.append([dev.f1, dev.auc, test.auc, test.f1, test.best_f1, test.accuracy, test.brier, test.ece, seconds])
        right = np.where(fitted.labels == 1, fitted.probabilities, 1 - fitted.probabilities)
        # In the training pairs' order for every spec and seed: losses can be compared pair by pair.
        losses.append(-np.log(np.maximum(right, 1e-12)))
    mean = np.mean(found, axis=0)
    spread = f" ± {np.std([each[2] for each in found]):.5f}" if seeds > 1 else ""
    cells = [
        ", ".join(crop.values()),
        " + ".join(algorithms) + "".join(f", {value} {key}" for key, value in changes.items()),
        f"{fitted.head.parameters:,}",
        f"{mean[0]:.4f}",
        f"{mean[1]:.5f}",
        f"{mean[2]:.5f}{spread}",
        *(f"{each:.4f}" for each in mean[3:8]),
        f"{mean[8]:.1f}",
    ]
    return Row(cells, fitted.head.parameters, losses[0])


def main(root: Path, record: bool) -> None:
    """Print the table; with `record`, keep it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare_lfw(root, Path(folder))
        for crop in SETTINGS:
            pairs = {}
            for name in ("train", "dev", "test"):
                job = Job.open(Path(folder) / f"{name}.csv", TrainOptions(engine="local", **crop))
                pairs[name] = LabelledPairs.collect(job.manifest, job.scan, embed_job(job)[1], name)
            found = [measured(crop, pairs, job, spec) for spec in recipes()]
            best = min((each.losses for each in found), key=np.mean)
            rows += [each.finished(best) for each in found]
            print(table(HEADER, rows[-len(found) :]), flush=True)
    rows.append(["none", "published experiment (chi-square, MLP), its own figures", "", "", "", "0.74", "0.80"])
    rows[-1] += ["0.73", "0.71", "", "", "", "", ""]
    publish("Heads on LFW View 1", "python benchmarks/heads.py ROOT", table(HEADER, rows), record=record)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--record" in sys.argv)
