"""What short numbers cost in accuracy: `python benchmarks/number_types.py LFW FIW.parquet [--record]`.

LFW's View 1 test pairs with detection and the shipped head, and 5,000 + 5,000 pairs of Families in the Wild's `val`
split (faces of 112 pixels, whole) by cosine, in every number type that this CPU has.
"""

import io
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from results import publish, table
from sklearn.metrics import roc_auc_score

import batchverify
from batchverify.embedding.embedder import Embedder
from batchverify.evaluation.figures import measure
from batchverify.manifest.prepare import prepare_lfw
from batchverify.runtime.compiled_network import capabilities

PAIRS, SEED = 5000, 0


def fiw_pairs(identities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, labels): as many pairs of one person as of two, (2 * PAIRS,) each; label 1 is two people."""
    rng = np.random.default_rng(SEED)
    groups = [np.flatnonzero(identities == each) for each in np.unique(identities)]
    same = np.array([pair for group in groups for pair in itertools.combinations(group, 2)])
    same = same[rng.choice(len(same), PAIRS, replace=False)]
    other = rng.integers(0, len(identities), (4 * PAIRS, 2))
    other = other[identities[other[:, 0]] != identities[other[:, 1]]][:PAIRS]
    pairs = np.concatenate([same, other])
    return pairs[:, 0], pairs[:, 1], np.repeat([0, 1], PAIRS)


def main(lfw: Path, fiw: Path, record: bool) -> None:
    """Print the table."""
    faces = pq.read_table(fiw)
    faces = faces.filter(np.array(faces["split"].to_pylist()) == "val")
    pictures = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in faces["image"].to_pylist()]
    a, b, labels = fiw_pairs(np.array(faces["identity"].to_pylist()))
    rows, exact = [], None
    with tempfile.TemporaryDirectory() as folder:
        prepare_lfw(lfw, Path(folder))
        for numbers in ["float32", *(["bfloat16"] if "BF16" in capabilities() else []), "int8"]:
            options: dict[str, Any] = {"runtime": "openvino", "dtype": numbers, "device": "cpu"}
            summary = batchverify.score(Path(folder) / "test.csv", no_cache=True, engine="local", **options)
            frame = summary.to_pandas().dropna(subset=["probability"])
            got = measure(frame["true_label"].to_numpy(), frame["probability"].to_numpy(), summary.threshold)
            vectors = Embedder(crop="none", **options)(pictures).vectors
            exact = vectors if exact is None else exact
            cosines = (vectors * exact).sum(axis=1)
            auc = roc_auc_score(labels, -(vectors[a] * vectors[b]).sum(axis=1))
            figures = [f"{got.auc:.5f}", f"{got.f1:.4f}", f"{got.accuracy:.4f}", f"{auc:.5f}"]
            rows.append([numbers, *figures, f"{cosines.mean():.5f}", f"{cosines.min():.5f}"])
    header = ["OpenVINO", "LFW View 1 test AUC", "F1 at the shipped threshold", "accuracy", "FIW val AUC"]
    header += [f"mean cosine to float32, {len(pictures):,} FIW faces", "lowest"]
    command = "python benchmarks/number_types.py LFW FIW.parquet"
    publish("Number types", command, table(header, rows), record=record)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--record" in sys.argv)
