"""Convolutions along one side of an image in bfloat16, which leave out the zeros around it; compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from batchverify.machine_code import compiled
from batchverify.products import panelled
from batchverify.tiles import PANEL, ROUND, ROWS, VECTORS, pixel_tile


class LineConvolution:
    """A convolution of 1 x K or K x 1 that keeps the size, its bias, and a slope for what is negative.

    For CPUs where `tiles.multiplies_bfloat16()`. weight: (D, C, 1, K) or (D, C, K, 1) float32, C a multiple of 16, D
    of 32, K odd, 3 at least. bias, slopes: (D,) float32.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray, slopes: np.ndarray) -> None:
        self.upright = weight.shape[3] == 1
        taps = weight.reshape(*weight.shape[:2], -1)
        self.outputs, self.inputs, self._taps = taps.shape
        self._loop = _loop()
        # A channel's weights after all channels of the tap before.
        self._weights = panelled(taps.swapaxes(1, 2).reshape(self.outputs, -1))
        self._numbers = np.ascontiguousarray(bias), np.ascontiguousarray(slopes)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(B, h, w, C) to (B, h, w, D): bits of bfloat16 as int16, contiguous.

        Raises `ValueError` for other channels, or where the other side has less than 8 pixels.
        """
        images, height, width, channels = values.shape
        if channels != self.inputs or channels % (2 * ROUND):
            raise ValueError(f"channels must be {self.inputs}, a multiple of {2 * ROUND}; got {channels}")
        if (width if self.upright else height) < ROWS:
            raise ValueError(f"the side beside the line must be {ROWS} pixels at least, got {values.shape}")
        target = np.empty((images, height, width, self.outputs), np.int16)
        # Along the line and beside it: how many pixels, and how far apart.
        sides = [(height, width), (width, 1)]
        (along, hop), (beside, step) = sides if self.upright else reversed(sides)
        shapes = np.array([images, along, hop, beside, step, channels // 2, self.outputs, self._taps])
        source = values.reshape(-1).view(np.int32)
        self._loop(source, shapes, self._weights, self._numbers, target.reshape(-1))
        return target


@cache
def _loop() -> Any:
    """The loop of `LineConvolution`."""
    shape = (ROWS, VECTORS, 0)

    @compiled
    def convolve(source: Any, shapes: Any, weights: Any, numbers: Any, target: Any) -> None:
        images, along, hop, beside, step = shapes[0], shapes[1], shapes[2], shapes[3], shapes[4]
        depth, filters, taps = shapes[5], shapes[6], shapes[7]
        bias, slopes = numbers
        padding = taps // 2
        for image in range(images):
            for place in range(along):
                # The taps that meet pixels of the image.
                first, end = max(0, padding - place), min(taps, along + padding - place)
                here = image * along * beside + place * hop
                there = here + (first - padding) * hop
                for panel in range(filters // PANEL):
                    at, begin = (panel * taps + first) * depth * PANEL, panel * PANEL
                    for start in range(0, beside, ROWS):
                        # The last tile begins earlier where it would reach beyond the side.
                        row = min(start, beside - ROWS)
                        pixel, to = there + row * step, (here + row * step) * filters + begin
                        pixel_tile(
                            shape,
                            (source,),
                            (depth,),
                            pixel,
                            step,
                            hop,
                            end - first,
                            weights,
                            at,
                            bias,
                            slopes,
                            begin,
                            target,
                            to,
                            step * filters,
                        )

    return convolve
