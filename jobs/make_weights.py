"""Make the packaged weights: `python jobs/make_weights.py FLOAT.pt|0095.xml [FACES.npy] [FOLDER]`.

0095.xml: face-reidentification-retail-0095 (FP16) of Open Model Zoo, from which the file of `compact` alone is made.

FLOAT.pt: the published vggface2 weights, which are stored with 8 bits a weight. FACES.npy: (N, S, S, 3) uint8 RGB
crops of training images, as the network takes them, which set the ranges of 8-bit activations; without them the
ranges of the packaged file are kept. FOLDER: where the files are written instead of into the package. The networks of
MTCNN are copied from facenet-pytorch.
"""

import json
import sys
from collections.abc import Mapping
from hashlib import sha384
from importlib.resources import files
from pathlib import Path

import numpy as np
import openvino
import torch
from openvino import opset13
from safetensors.numpy import save

from batchverify.embedding import compact
from batchverify.embedding.backbone import (
    COMPACT,
    METADATA_KEY,
    RANGES_KEY,
    Backbone,
    dequantise,
    fingerprint,
    load_backbone,
    packaged_weights,
    quantise,
    read_tensors,
)
from batchverify.embedding.cpu_network import build_model
from batchverify.embedding.inception import ARCHITECTURE, CPU_BATCH
from batchverify.embedding.network import Ranges
from batchverify.faces.mtcnn import weights_path
from batchverify.runtime.compiled_network import CompiledNetwork
from batchverify.runtime.devices import available_cpus

# The input is signed, and the activations of `conv2d_2a` reach so far that rounding them is as bad as rounding all
# others. Both layers are cheap and stay in floats.
FLOAT_LAYERS = ("conv2d_1a", "conv2d_2a")
EARLY_LAYERS = ("conv2d_2b", "conv2d_3b", "conv2d_4a", "conv2d_4b")
BINS, LEVELS = 2048, 255
# In the compact network 8 bits pay in the layers that expand a block's input, which has few outliers: a seventh of
# the time. Rounding the inputs of the projections, too, brings half as much again, but moves vectors twice as far.
COMPACT_LAYERS = ".expand"
# The range of a layer covers all activations of this share of the faces. The first stage has the most pixels.
FIRST_STAGE, FIRST_SHARE, SHARE = "stage0", 0.5, 0.98


def packaged_bytes(source: Path, ranges: Ranges) -> bytes:
    """The file of the packaged backbone; the float tensors and the ranges alone determine its bytes."""
    stored = quantise(read_tensors(source))
    about = {
        "architecture": ARCHITECTURE,
        "fingerprint": fingerprint(dequantise(stored)),
        "format": "int8 per output channel, weight = int8 * scale",
        "source": source.name,
        RANGES_KEY: {name: high for name, (_, high) in ranges.items()},
    }
    return save(stored, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})


def mtcnn_bytes() -> bytes:
    """The file with MTCNN's three networks; those of facenet-pytorch alone determine its bytes."""
    tensors = {}
    for network in ("pnet", "rnet", "onet"):
        source = Path(str(files("facenet_pytorch") / "data" / f"{network}.pt"))
        for name, tensor in torch.load(source, weights_only=True).items():
            tensors[f"{network}.{name}"] = tensor.contiguous().numpy()
    return save(tensors, metadata={"source": "facenet-pytorch 2.5.3, data/*.pt"})


def compact_bytes(source: Path, ranges: Ranges) -> bytes:
    """The file of `compact`; the constants of the model, in the order of the forward pass, and the ranges alone
    determine its bytes.
    """
    tensors = compact_tensors(source)
    floats = {name: array.astype(np.float32) for name, array in tensors.items()}
    about = {
        "architecture": compact.ARCHITECTURE,
        "fingerprint": fingerprint(floats, compact.ARCHITECTURE),
        "format": "float16",
        "licence": "Apache-2.0",
        "source": "Open Model Zoo, face-reidentification-retail-0095, FP16",
        "sha384": {
            path.suffix: sha384(path.read_bytes()).hexdigest() for path in (source, source.with_suffix(".bin"))
        },
        RANGES_KEY: dict(ranges),
    }
    return save(tensors, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})


def compact_tensors(source: Path) -> dict[str, np.ndarray]:
    """The float16 tensors of `compact`."""
    model = openvino.Core().read_model(source)
    constants = (node.data for node in model.get_ordered_ops() if node.get_type_name() == "Constant")
    return {
        name: np.ascontiguousarray(constant, np.float16).reshape(shape)
        for (name, shape), constant in zip(compact.tensor_shapes().items(), constants, strict=True)
    }


def compact_ranges(tensors: Mapping[str, np.ndarray], faces: np.ndarray) -> Ranges:
    """Ranges for the layers of `compact` that lose little, from (N, 128, 128, 3) uint8 training faces."""
    model = build_model(Backbone("", dict(tensors), "", architecture=compact.ARCHITECTURE), compact.CPU_BATCH, {})
    layers = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    taken = {node.get_friendly_name(): node.input_value(0) for node in layers}
    taken = {name: values for name, values in taken.items() if name.endswith(COMPACT_LAYERS)}
    pixels = opset13.constant(np.array([1, 2, 3]))
    ends = [
        reduce(values, pixels) for values in taken.values() for reduce in (opset13.reduce_min, opset13.reduce_max)
    ]
    outputs = [opset13.result(values) for values in ends]
    network = CompiledNetwork(openvino.Model(outputs, model.get_parameters()), threads=available_cpus())
    batches = batched(faces, compact.CPU_BATCH)
    extremes = np.concatenate([np.stack(network(batch)) for batch in batches], axis=1)  # (2 * layers, N)
    shares = [FIRST_SHARE if name.startswith(FIRST_STAGE) else SHARE for name in taken]
    return {
        name: (float(np.float32(np.quantile(low, 1 - share))), float(np.float32(np.quantile(high, share))))
        for name, low, high, share in zip(taken, extremes[::2], extremes[1::2], shares, strict=True)
    }


def batched(faces: np.ndarray, size: int) -> np.ndarray:
    """(N, S, S, 3) to (N / size, size, S, S, 3), without the last faces if they fill no batch."""
    return faces[: len(faces) // size * size].reshape(-1, size, *faces.shape[1:])


def activation_ranges(tensors: Mapping[str, np.ndarray], faces: np.ndarray) -> Ranges:
    """Ranges for the layers that lose little with 8-bit activations, from (N, 160, 160, 3) uint8 training faces.

    A block's range is the largest activation seen. The first layers see many pixels and few large values: their range
    is the one with the least mean squared rounding error, which cuts off the large values (measured: half the error).
    """
    model = build_model(Backbone("", dict(tensors), ""), CPU_BATCH, {})
    layers = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    taken = {node.get_friendly_name(): node.input_value(0) for node in layers}
    taken = {name: values for name, values in taken.items() if name not in FLOAT_LAYERS}
    outputs = [opset13.result(values) for values in taken.values()]
    network = CompiledNetwork(openvino.Model(outputs, model.get_parameters()), threads=available_cpus())
    batches = batched(faces, CPU_BATCH)
    largest = np.max([[values.max() for values in network(batch)] for batch in batches], axis=0)
    ranges = dict(zip(taken, largest.tolist(), strict=True))
    counts = {name: np.zeros(BINS, np.int64) for name in EARLY_LAYERS}
    for batch in batches:
        for name, values in zip(taken, network(batch), strict=True):
            if name in counts:
                bins = (values.ravel() * np.float32(BINS / ranges[name])).astype(np.int64)
                counts[name] += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)
    ranges |= {name: least_error(histogram, ranges[name]) for name, histogram in counts.items()}
    return {name: (0.0, float(np.float32(value))) for name, value in ranges.items()}


def least_error(counts: np.ndarray, largest: float) -> float:
    """The range, at most `largest`, that rounds a (BINS,) histogram of activations with the least error."""
    centres = (np.arange(BINS) + 0.5) * (largest / BINS)
    errors = {}
    for share in np.arange(0.2, 1.001, 0.02):
        step = share * largest / LEVELS
        rounded = np.minimum(np.rint(centres / step), LEVELS) * step
        # The first bin is left out: zero, the most frequent activation, is always exact.
        errors[float(share)] = float((counts * (rounded - centres) ** 2)[1:].sum())
    return min(errors, key=lambda share: errors[share]) * largest


def main(source: Path, faces: Path | None, folder: Path | None) -> None:
    """Write the files, into the package or into `folder`."""
    if source.suffix == ".xml":
        ranges = load_backbone(COMPACT).ranges
        if faces is not None:
            tensors = {name: array.astype(np.float32) for name, array in compact_tensors(source).items()}
            ranges = compact_ranges(tensors, np.load(faces))
        write({packaged_weights(COMPACT): compact_bytes(source, ranges)}, folder)
        return
    ranges = load_backbone().ranges
    if faces is not None:
        ranges = activation_ranges(dequantise(quantise(read_tensors(source))), np.load(faces))
    write({packaged_weights(): packaged_bytes(source, ranges), weights_path(): mtcnn_bytes()}, folder)


def write(made: Mapping[Path, bytes], folder: Path | None) -> None:
    """Write files to their places in the package, or into `folder`."""
    for packaged, data in made.items():
        path = folder / packaged.name if folder else packaged
        path.write_bytes(data)
        print(f"{path}: {len(data):,} bytes")


if __name__ == "__main__":
    source, *others = map(Path, sys.argv[1:])
    faces = next((path for path in others if path.suffix == ".npy"), None)
    main(source, faces, next((path for path in others if path != faces), None))
