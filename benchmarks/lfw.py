"""View 1 of LFW end to end, for each shipped setting: `python benchmarks/lfw.py ROOT [--record]`.

Prepares the manifests, scores the 1,000 test pairs and prints accuracy; `--record` adds the table to RESULTS.md.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from facenet import eager_network
from PIL import Image
from results import publish, table

import batchverify
from batchverify.embedding.embedder import Embedder
from batchverify.evaluation.figures import Metrics, measure
from batchverify.faces.crops import Face
from batchverify.heads.head import find_head
from batchverify.manifest.prepare import prepare_lfw

BATCH = 32
SETTINGS: tuple[dict[str, Any], ...] = (
    {"crop": "detect"},
    {"crop": "detect", "tta": "flip"},
    {"crop": "center"},
    {"crop": "none"},
)
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


def table_row(manifest: Path, settings: dict[str, Any]) -> list[str]:
    """Score the test manifest without a cache and measure."""
    summary = batchverify.score(manifest, **settings, no_cache=True, engine="local")
    frame = summary.to_pandas().dropna(subset=["probability"])
    got = measure(frame["true_label"].to_numpy(), frame["probability"].to_numpy(), summary.threshold)
    embedded = f"{summary.embedded:,} for {2 * summary.rows:,} references"
    return [", ".join(settings.values()), *figures(got), embedded, f"{summary.images_per_second:.1f}"]


def figures(got: Metrics) -> list[str]:
    """The cells of the accuracy columns."""
    return [
        f"{got.auc:.5f}",
        *(f"{each:.4f}" for each in (got.f1, got.best_f1, got.accuracy, got.brier, got.ece)),
    ]


@torch.inference_mode()
def eager_row(manifest: Path) -> list[str]:
    """The same faces through facenet-pytorch's own network in float32, layer by layer: what speed must not cost."""
    frame = pd.read_csv(manifest)
    names = pd.unique(frame[["image_a", "image_b"]].to_numpy().ravel())
    embedder = Embedder("vggface2", device="cpu")
    faces = embedder.find_faces([np.asarray(Image.open(manifest.parent / name)) for name in names])
    pixels = torch.from_numpy(np.stack([face.pixels for face in faces if isinstance(face, Face)])).permute(0, 3, 1, 2)
    network = eager_network()
    rows = [network((batch.float() - 127.5) / 128) for batch in pixels.split(BATCH)]
    vectors = dict(zip(names, torch.nn.functional.normalize(torch.cat(rows)).numpy(), strict=True))
    sides = [np.stack([vectors[name] for name in frame[side]]) for side in ("image_a", "image_b")]
    head = find_head(None, embedder.fingerprint)
    probability, _ = head(*(side.astype(np.float16) for side in sides))
    got = measure(frame["label"].to_numpy(), probability, head.threshold(None, None))
    return ["detect, float32, facenet-pytorch's network", *figures(got), f"{len(names):,}", ""]


def main(root: Path, record: bool) -> None:
    """Print the table; with `record`, keep it."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_lfw(root, Path(folder))
        rows = [table_row(Path(folder) / "test.csv", settings) for settings in SETTINGS]
        rows.append(eager_row(Path(folder) / "test.csv"))
    publish("LFW View 1 test", "python benchmarks/lfw.py ROOT", table(HEADER, rows), record=record)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--record" in sys.argv)
