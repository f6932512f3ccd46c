"""View 1 of LFW end to end, for each shipped setting: `python benchmarks/lfw.py ROOT [--append]`.

Prepares the manifests, scores the 1,000 test pairs and prints accuracy; `--append` adds the table to RESULTS.md.
"""

import sys
import tempfile
from pathlib import Path

from results import publish, table

import batchverify
from batchverify.datasets import prepare_lfw
from batchverify.metrics import measure

SETTINGS = ({"crop": "detect"}, {"crop": "detect", "tta": "flip"}, {"crop": "center"}, {"crop": "none"})
HEADER = [
    "setting",
    "AUC",
    "F1 at the shipped threshold",
    "best possible F1",
    "accuracy",
    "Brier",
    "ECE",
    "embedded",
    "images/s",
]


def table_row(manifest: Path, settings: dict[str, str]) -> list[str]:
    """Score the test manifest without a cache and measure."""
    summary = batchverify.score(manifest, **settings, no_cache=True, engine="local")
    frame = summary.to_pandas().dropna(subset=["probability"])
    got = measure(frame["true_label"].to_numpy(), frame["probability"].to_numpy(), summary.threshold)
    return [
        ", ".join(settings.values()),
        f"{got.auc:.5f}",
        *(f"{each:.4f}" for each in (got.f1, got.best_f1, got.accuracy, got.brier, got.ece)),
        f"{summary.embedded:,} for {2 * summary.rows:,} references",
        f"{summary.images_per_second:.1f}",
    ]


def main(root: Path, append: bool) -> None:
    """Print the table; with `append`, keep it."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_lfw(root, Path(folder))
        rows = [table_row(Path(folder) / "test.csv", settings) for settings in SETTINGS]
    publish("LFW View 1 test", "python benchmarks/lfw.py ROOT", table(HEADER, rows), append=append)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--append" in sys.argv)
