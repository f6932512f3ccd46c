"""Convolutions of 1 x 1 in bfloat16: products of pixels' channels with a matrix, compiled for the CPU at hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from batchverify.machine_code import compiled
from batchverify.tiles import PANEL, ROUND, ROWS, VECTORS, fetch_range, pixel_tile
from batchverify.winograd import bfloat16


class PixelProduct:
    """A convolution of 1 x 1, its bias, and a slope for what is negative (0 is ReLU, 1 leaves it).

    For CPUs where `tiles.multiplies_bfloat16()`. weight: (D, C) float32. bias, slopes: (D,) float32. outputs: how
    many of the D channels go to each of the arrays that are made, multiples of 32; all to one unless said.
    """

    def __init__(
        self, weight: np.ndarray, bias: np.ndarray, slopes: np.ndarray, outputs: Sequence[int] | None = None
    ) -> None:
        self.inputs, self.outputs = weight.shape[1], tuple(outputs or [len(weight)])
        self._loops = _loop(False), _loop(True)
        self._weights = panelled(weight)
        self._numbers = np.ascontiguousarray(bias), np.ascontiguousarray(slopes)

    def __call__(self, *values: np.ndarray, onto: np.ndarray | None = None) -> list[np.ndarray]:
        """(B, h, w, C') bits of bfloat16 as int16, contiguous, whose C' are C together, multiples of 16.

        Returns (B, h, w, D') for each of `outputs`. onto: (B, h, w, D), contiguous, where there is one of them: the
        sums are added to it before the slope, and it is what is returned. Raises `ValueError` for other shapes.
        """
        channels = [each.shape[-1] for each in values]
        if sum(channels) != self.inputs or any(count % (2 * ROUND) for count in channels):
            raise ValueError(
                f"channels must be {self.inputs} together, in multiples of {2 * ROUND}; got {channels}"
            )
        if onto is not None and (len(self.outputs) > 1 or not onto.flags.c_contiguous):
            raise ValueError("sums are added to one contiguous array")
        shape = values[0].shape[:-1]
        pixels = int(np.prod(shape))
        target = np.empty(pixels * sum(self.outputs), np.int16) if onto is None else onto.reshape(-1)
        starts = np.cumsum([0, *self.outputs]) * pixels
        # Of each panel of outputs: where the first pixel's begin, and how far the next pixel's are.
        places = np.array(
            [
                (start + first, width)
                for start, width in zip(starts, self.outputs, strict=False)
                for first in range(0, width, PANEL)
            ]
        )
        sources = tuple(each.reshape(-1).view(np.int32) for each in values)
        widths = tuple(count // 2 for count in channels)
        self._loops[onto is not None](sources, widths, pixels, self._weights, self._numbers, places, target)
        ends = zip(starts, starts[1:], self.outputs, strict=False)
        return [target[start:end].reshape(*shape, width) for start, end, width in ends]


def panelled(weight: np.ndarray) -> np.ndarray:
    """(D, K) float32 to (D / PANEL, K / 2, PANEL) pairs of bfloat16 as int32, flat."""
    panels = weight.reshape(len(weight) // PANEL, PANEL, -1, 2).transpose(0, 2, 1, 3)
    return bfloat16(panels).reshape(-1).view(np.int32)


@cache
def _loop(adds: bool) -> Any:
    """The loop of `PixelProduct`."""
    shape, single = (ROWS, VECTORS, int(adds)), (1, VECTORS, int(adds))

    @compiled
    def multiply(
        sources: Any, widths: Any, pixels: int, weights: Any, numbers: Any, places: Any, target: Any
    ) -> None:
        bias, slopes = numbers
        panels = len(places)
        depth, share = len(weights) // panels, -(-ROWS // panels)
        whole = pixels // ROWS * ROWS
        for pixel in range(0, whole, ROWS):
            for panel in range(panels):
                to, down = places[panel, 0], places[panel, 1]
                # The next pixels, a few beside each panel: they come from far while these are multiplied.
                for row in range(panel * share, min(ROWS, (panel + 1) * share)):
                    following = pixel + ROWS + row
                    if following < pixels:
                        for which in range(len(sources)):
                            fetch_range(sources[which], following * widths[which], widths[which])
                        if adds:
                            fetch_range(target, following * down, down)
                at, begin, to = panel * depth, panel * PANEL, to + pixel * down
                pixel_tile(
                    shape, sources, widths, pixel, 1, 0, 1, weights, at, bias, slopes, begin, target, to, down
                )
        for pixel in range(whole, pixels):
            for panel in range(panels):
                to, down = places[panel, 0] + pixel * places[panel, 1], places[panel, 1]
                at, begin = panel * depth, panel * PANEL
                pixel_tile(
                    single,
                    sources,
                    widths,
                    pixel,
                    1,
                    0,
                    1,
                    weights,
                    at,
                    bias,
                    slopes,
                    begin,
                    target,
                    to,
                    down,
                )

    return multiply
