"""facenet-pytorch's own network with our packaged weights: what every figure is held against."""

import torch
from facenet_pytorch import InceptionResnetV1

from batchverify.embedding.backbone import load_weights


def eager_network() -> torch.nn.Module:
    """InceptionResnetV1 as facenet-pytorch's examples use it: float32, in evaluation mode, on the CPU."""
    network = InceptionResnetV1(pretrained=None, classify=False)
    tensors = {name: torch.from_numpy(array) for name, array in load_weights("vggface2").tensors.items()}
    # Counters of batches seen are the only tensors that are not packaged.
    missing, unknown = network.load_state_dict(tensors, strict=False)
    if unknown or not all(name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"not the packaged weights: {unknown} too many, {missing} missing")
    return network.eval().requires_grad_(False)
