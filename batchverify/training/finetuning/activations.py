"""What the frozen part of a network makes of faces and of augmented views of them, computed once and kept on disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from batchverify.embedding.forward import is_out_of_memory
from batchverify.errors import BatchverifyError
from batchverify.faces.crops import augmented
from batchverify.fingerprint import AUGMENTATION
from batchverify.runtime.devices import available_cpus
from batchverify.training.finetuning.face_crops import FaceCrops, Report
from batchverify.training.finetuning.stored_blocks import StoredBlocks
from batchverify.training.finetuning.trainable import FrozenPart


class Activations:
    """Activations of M images, float16 on disk, in 1 + `views` views each: the face itself and augmented ones.

    Where nothing is frozen, they are computed from the faces when they are asked for, in any view. Those of a
    failed image mean nothing. Copies by pickle read the same files.
    """

    def __init__(self, crops: FaceCrops, frozen: FrozenPart, views: int, blocks: StoredBlocks | None) -> None:
        self._crops, self._frozen, self.views, self._blocks = crops, frozen, views, blocks

    def __len__(self) -> int:
        return len(self._crops)

    @classmethod
    def computed(
        cls,
        crops: FaceCrops,
        frozen: FrozenPart,
        views: int,
        folder: Path,
        *,
        batch: int = 32,
        progress: Report = lambda *_: None,
    ) -> Activations:
        """Compute them on `frozen.device`, or take those of the same faces and network that `folder` holds already.

        views: number of augmented views. batch: faces at a time; a kill loses one batch. progress: is told of faces.
        Raises `BatchverifyError` if memory or the disk is too small, and for activations that float16 cannot hold.
        """
        if frozen.is_empty:
            return cls(crops, frozen, views, None)
        origin = {
            "crops": crops.origin,
            "backbone": frozen.fingerprint,
            "unfreeze": frozen.unfreeze,
            "dtype": "bfloat16" if frozen.mixed else "float32",
            "augmentation": AUGMENTATION,
        }
        one = _forward(frozen, np.zeros((1, frozen.size, frozen.size, 3), np.uint8))
        shape = (len(crops) * (1 + views), *one.shape[1:])
        blocks = StoredBlocks(folder, origin, shape, np.float16, batch)
        missing = blocks.missing
        done = len(blocks.array) - sum(len(blocks.span(block)) for block in missing)
        progress(done, shape[0])
        for block in missing:
            view, images = np.divmod(np.array(blocks.span(block)), len(crops))
            blocks.write(block, _rows(crops, frozen, images, view))
            done += len(images)
            progress(done, shape[0])
        return cls(crops, frozen, views, blocks)

    def batch(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """(B, ...) float32 on the device of the frozen part, of images (B,) in views (B,), 0 for the face itself.

        Raises `IndexError` for an image or view that there is not.
        """
        if len(images) and (min(images.min(), views.min()) < 0 or images.max() >= len(self)):
            raise IndexError(f"images 0 to {len(self) - 1} in views from 0, not {images} in {views}")
        if self._blocks is None:
            return _forward(self._frozen, faces_in_views(self._crops, images, views))
        if len(views) and views.max() > self.views:
            raise IndexError(f"views 0 to {self.views}, not {views.max()}")
        rows = self._blocks.array[views.astype(np.int64) * len(self) + images]
        return torch.from_numpy(rows).to(self._frozen.device).float()


def faces_in_views(crops: FaceCrops, images: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(B, S, S, 3) uint8: faces (view 0) and augmented, possibly blurred views of them; black for failed images."""
    pixels = np.asarray(crops.pixels[images])
    changed = [row for row in np.flatnonzero(views).tolist() if int(images[row]) not in crops.failed]

    def change(row: int) -> None:
        key = crops.keys[int(images[row])]
        pixels[row] = augmented(pixels[row], key, int(views[row]), blur=True)

    if changed:
        with ThreadPoolExecutor(available_cpus(), "augment") as pool:
            list(pool.map(change, changed))
    return pixels


def _rows(crops: FaceCrops, frozen: FrozenPart, images: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Activations of images in views, (B, ...) float16."""
    values = _forward(frozen, faces_in_views(crops, images, views)).cpu().numpy()
    with np.errstate(over="ignore"):
        rows = values.astype(np.float16)
    if not np.isfinite(rows).all():
        largest = np.abs(values).max()
        raise BatchverifyError(
            f"--unfreeze {frozen.unfreeze}: the frozen blocks give values up to {largest:.3g}, which float16 "
            "cannot hold; unfreeze another block, or all"
        )
    return rows


def _forward(frozen: FrozenPart, pixels: np.ndarray) -> torch.Tensor:
    """The output for (B, S, S, 3) uint8, in smaller parts if memory runs out."""
    try:
        return frozen(torch.from_numpy(pixels))
    except (RuntimeError, MemoryError) as exc:
        if not (isinstance(exc, MemoryError) or is_out_of_memory(exc)):
            raise
        if len(pixels) == 1:
            raise BatchverifyError(f"{frozen.device}: no memory for the frozen part of the network") from exc
    half = len(pixels) // 2
    return torch.cat([_forward(frozen, pixels[:half]), _forward(frozen, pixels[half:])])
