"""Make the packaged weights: `python jobs/make_weights.py FLOAT.pt [FACES.npy] [FOLDER]`.

FLOAT.pt: the published vggface2 weights, stored with 8 bits a weight. FACES.npy: (N, 160, 160, 3) uint8 RGB crops of
training pictures, by which the ranges of 8-bit activations are chosen; without them the packaged file's are kept.
MTCNN's networks are taken from facenet-pytorch as they are.
"""

import json
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from batchverify.backbones import (
    METADATA_KEY,
    RANGES_KEY,
    dequantise,
    fingerprint,
    load_backbone,
    packaged_weights,
    quantise,
    read_tensors,
)
from batchverify.cpu_network import activation_ranges
from batchverify.inception import ARCHITECTURE
from batchverify.mtcnn import weights_path


def packaged_bytes(source: Path, ranges: Mapping[str, float]) -> bytes:
    """The packaged backbone's bytes: a function of the float tensors and of the ranges."""
    stored = quantise(read_tensors(source))
    about = {
        "architecture": ARCHITECTURE,
        "fingerprint": fingerprint(dequantise(stored)),
        "format": "int8 per output channel, weight = int8 * scale",
        "source": source.name,
        RANGES_KEY: dict(ranges),
    }
    return save(stored, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})


def mtcnn_bytes() -> bytes:
    """MTCNN's three networks as one file, a function of facenet-pytorch's."""
    tensors = {}
    for network in ("pnet", "rnet", "onet"):
        source = Path(str(files("facenet_pytorch") / "data" / f"{network}.pt"))
        for name, tensor in torch.load(source, weights_only=True).items():
            tensors[f"{network}.{name}"] = tensor.contiguous().numpy()
    return save(tensors, metadata={"source": "facenet-pytorch 2.5.3, data/*.pt"})


def main(source: Path, faces: Path | None, folder: Path) -> None:
    """Write both files."""
    backbone = load_backbone()
    ranges = backbone.ranges if faces is None else activation_ranges(backbone, np.load(faces))
    made = {packaged_weights().name: packaged_bytes(source, ranges), weights_path().name: mtcnn_bytes()}
    for name, data in made.items():
        (folder / name).write_bytes(data)
        print(f"{folder / name}: {len(data):,} bytes")


if __name__ == "__main__":
    given = [Path(each) for each in sys.argv[1:]]
    chosen = [each for each in given[1:] if each.suffix == ".npy"]
    targets = [each for each in given[1:] if each.suffix != ".npy"]
    main(given[0], chosen[0] if chosen else None, targets[0] if targets else packaged_weights().parent)
