"""The image reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bad_images import good_images
from target import Target, require
from tiff_samples import Tiff

from batchverify.faces.images import decode, own_process
from batchverify.records import DecodedImage, Limits, Reason


class ImageTarget(Target):
    """An image of any format."""

    LIMITS = Limits(pixels=1_000_000)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        own_process()

    def seeds(self) -> list[bytes]:
        """One of every format, and TIFFs of several depths."""
        greys = np.arange(64).reshape(8, 8, 1)
        return [*good_images().values(), *(Tiff(bits=bits).write(greys) for bits in (1, 4, 12, 16, 32))]

    def run(self, data: bytes) -> None:
        """Decode."""
        result = decode(data, self.LIMITS, 640)
        if isinstance(result, DecodedImage):
            height, width, colours = result.pixels.shape
            require(colours == 3 and 0 < max(height, width) <= 640, f"{result.pixels.shape}")
            require(result.pixels.dtype == np.uint8 and result.scale >= 1, f"{result.scale}")
        else:
            require(result.reason in (Reason.UNDECODABLE, Reason.TOO_LARGE), f"{result}")
            require(0 < len(result.message) < 200 and bool(result.depends), f"{result}")


TARGET = ImageTarget
