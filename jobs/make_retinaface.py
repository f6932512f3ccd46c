"""Make the packaged detector: `python jobs/make_retinaface.py mobilenet0.25_Final.pth [FOLDER]`.

The published RetinaFace weights (MIT licence) in the layout of `batchverify/faces/retinaface_network.py`: batch
normalisation folded in, the two logits of an anchor replaced by their difference, the input RGB, 16-bit floats.
FOLDER: where the file is written instead of into the package.
"""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from batchverify.faces.retinaface_network import weights_path

EPSILON = 1e-5
ANCHORS = 2
# A published convolution's name, and ours. The batch normalisation is the module after it.
NAMES = (
    (r"body\.(stage\d)\.0\.0", r"\1.0"),
    (r"body\.(stage\d\.\d+)\.0", r"\1.depthwise"),
    (r"body\.(stage\d\.\d+)\.3", r"\1.pointwise"),
    (r"fpn\.output(\d)\.0", r"lateral\1"),
    (r"fpn\.(merge\d)\.0", r"\1"),
    (r"ssh(\d)\.conv3X3\.0", r"context\1.near"),
    (r"ssh(\d)\.conv5X5_(\d)\.0", r"context\1.middle\2"),
    (r"ssh(\d)\.conv7X7_2\.0", r"context\1.far1"),
    (r"ssh(\d)\.conv7x7_3\.0", r"context\1.far2"),
)
Tensors = dict[str, np.ndarray]


def renamed(name: str) -> str | None:
    """Our name of a convolution's weights; None for other tensors."""
    if name == "body.stage1.0.0.weight":
        return "stage1.0"
    for pattern, ours in NAMES[1:]:
        if match := re.fullmatch(pattern + r"\.weight", name):
            return match.expand(ours)
    return None


def folded(state: Tensors) -> Tensors:
    """All tensors under our names, float32."""
    tensors: Tensors = {}
    for name, weight in state.items():
        if (ours := renamed(name)) is None:
            continue
        prefix, number = name.removesuffix(".weight").rsplit(".", 1)
        gain, shift, mean, variance = (
            state[f"{prefix}.{int(number) + 1}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / np.sqrt(variance + EPSILON)
        tensors[f"{ours}.weight"] = weight * factor.reshape(-1, 1, 1, 1)
        tensors[f"{ours}.bias"] = shift - mean * factor
    # BGR to RGB.
    tensors["stage1.0.weight"] = tensors["stage1.0.weight"][:, ::-1]
    for level in range(1, 4):
        for part in ("weight", "bias"):
            tensors[f"head{level}.{part}"] = joined(state, level - 1, part)
    return tensors


def joined(state: Tensors, level: int, part: str) -> np.ndarray:
    """The three output layers of a level as one: for each anchor the logit, the box, the landmarks."""
    classes, boxes, landmarks = (
        state[f"{kind}Head.{level}.conv1x1.{part}"] for kind in ("Class", "Bbox", "Landmark")
    )
    classes, boxes, landmarks = (each.reshape(ANCHORS, -1, *each.shape[1:]) for each in (classes, boxes, landmarks))
    rows = np.concatenate([classes[:, 1:] - classes[:, :1], boxes, landmarks], axis=1)
    return rows.reshape(-1, *rows.shape[2:])


def retinaface_bytes(source: Path) -> bytes:
    """The packaged file; the published one alone determines its bytes."""
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    state = {name: tensor.numpy() for name, tensor in loaded.items()}
    tensors = {name: np.ascontiguousarray(array, np.float16) for name, array in folded(state).items()}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    # One entry: several would come in any order.
    return save(tensors, metadata={"source": f"{source.name}, SHA-256 {digest}"})


if __name__ == "__main__":
    data = retinaface_bytes(Path(sys.argv[1]))
    path = Path(sys.argv[2]) / weights_path().name if sys.argv[2:] else weights_path()
    path.write_bytes(data)
    print(f"{path}: {len(data):,} bytes")
