"""The reader of weights, and of what their header says."""

from __future__ import annotations

import io

import numpy as np
from target import Target, require

from batchverify.embedding.backbone import read_tensors, stored_ranges
from batchverify.errors import ArtifactError


class BackboneTarget(Target):
    """Weights. The first byte chooses safetensors as a file, safetensors by its header alone, or torch's format."""

    def seeds(self) -> list[bytes]:
        """A few tensors in every format."""
        import torch
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {
            "a.weight": np.ones((2, 3), np.float32),
            "b": np.arange(4, dtype=np.float16),
        }
        tensors |= {"c": np.ones((2, 2), np.int8), "c.scale": np.ones(2, np.float32)}
        about = {"batchverify": '{"activation_ranges": {"a": 1.5, "c": [-1, 2]}, "fingerprint": "x"}'}
        file = save(tensors, metadata=about)
        header = file[8 : 8 + int.from_bytes(file[:8], "little")]
        seeds = [b"\0" + file, b"\1" + header]
        for new in (True, False):
            stream = io.BytesIO()
            state = {name: torch.from_numpy(array) for name, array in tensors.items()}
            torch.save(state, stream, _use_new_zipfile_serialization=new)
            seeds.append(b"\2" + stream.getvalue())
        return seeds

    def run(self, data: bytes) -> None:
        """Read the tensors and what the header says."""
        kind, content = (data[0] % 3, data[1:]) if data else (0, b"")
        if kind == 1:
            content = len(content).to_bytes(8, "little") + content + bytes(64)
        file = self.folder / ("w.pt" if kind == 2 else "w.safetensors")
        file.write_bytes(content)
        try:
            tensors = read_tensors(file)
            ranges = stored_ranges(file)
        except ArtifactError as exc:
            require(str(file) in str(exc), f"names no file: {exc}")
            return
        for name, array in tensors.items():
            require(array.dtype == np.float32 and bool(np.isfinite(array).all()), f"{name}: {array.dtype}")
        require(all(-np.inf < low <= 0 < high < np.inf for low, high in ranges.values()), f"{ranges}")


TARGET = BackboneTarget
