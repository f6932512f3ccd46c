"""How sharp a cropped face is."""

from __future__ import annotations

import numpy as np

# Weights of red, green and blue in a grey value (ITU-R BT.601).
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def sharpness(pixels: np.ndarray) -> float:
    """The variance of the Laplacian of grey values in the middle of an (S, S, 3) uint8 RGB face, at least 0.

    Pech-Pacheco et al. (2000), "Diatom autofocusing in brightfield microscopy"; the Laplacian is that of the four
    neighbours. Small or blurred faces have low values, and so have faces without contrast; noise raises it. Only the
    middle half of the side counts, since edges of the background, of hair and of the image say nothing of a face.
    """
    side = pixels.shape[0]
    edge = side // 4
    grey = pixels[edge : side - edge, edge : side - edge].astype(np.float32) @ _GREY
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())
