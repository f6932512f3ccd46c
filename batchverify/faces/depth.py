"""What the samples of an image mean where Pillow does not say: greys of more than 8 bits, and odd TIFFs.

Sources: TIFF 6.0 (Adobe, 1992) and Pillow's TIFF plug-in, which takes samples as they lie in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, TiffTags

from batchverify.errors import UsageError

# TIFF's numbers for photometric interpretations and sample formats.
WHITE_IS_ZERO, PALETTE = 0, 3
UNSIGNED, FLOAT, UNDEFINED = 1, 3, 4
_NAMES = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}


def check_tiff(tags: Mapping[int, Any]) -> None:
    """Raise `UsageError`, with the reason, for a TIFF that Pillow decodes to other pixels than those it holds."""
    bits, formats = _all(tags, "BitsPerSample", 1), _all(tags, "SampleFormat", UNSIGNED)
    planar = tags.get(_NAMES["PlanarConfiguration"], 1) != 1
    signed = set(formats) - {UNSIGNED, FLOAT, UNDEFINED}
    if signed:
        raise UsageError(f"samples of the format {min(signed)}: only unsigned ones and floats are read")
    if planar and len(bits) > 1 and max(bits) > 8:
        raise UsageError(f"{max(bits)} bits a sample in separate planes are not read")
    meaning = tags.get(_NAMES["PhotometricInterpretation"], WHITE_IS_ZERO)
    if planar and (meaning == WHITE_IS_ZERO or tags.get(_NAMES["FillOrder"], 1) != 1):
        raise UsageError("separate planes in which white is zero, or with reversed bits, are not read")
    colours = tags.get(_NAMES["ColorMap"], ())
    if meaning == PALETTE and max(colours, default=0) < 256:
        raise UsageError("the palette has colours of 8 bits where 16 are due")


def _all(tags: Mapping[int, Any], name: str, default: int) -> Sequence[int]:
    values = tags.get(_NAMES[name], default)
    return values if isinstance(values, tuple) else (values,)


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def eight_bits(image: Image.Image) -> Image.Image:
    """A deep grey image in 8 bits (mode L); what is transparent is white.

    Integers are shares of the largest one that their file's depth allows. Floats are shares of 1, or of 255 if one
    is above 1; not a number counts as black. Raises `UsageError` for floats above 255: nobody knows what is white.
    """
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    white = _white(image, values, tags)
    if image.mode == "I":
        values = values.view(np.uint32)
    shares = np.nan_to_num(values.astype(np.float64)) / white
    if tags and tags.get(_NAMES["PhotometricInterpretation"], WHITE_IS_ZERO) == WHITE_IS_ZERO:
        shares = 1 - shares
    transparent = image.info.get("transparency")
    if transparent is not None:
        shares[values == transparent] = 1
    return Image.fromarray(np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8))


def _white(image: Image.Image, values: np.ndarray, tags: Mapping[int, Any]) -> float:
    """The value that means white."""
    if image.mode == "F":
        peak = float(np.nan_to_num(values).max(initial=0))
        if peak > 255:
            raise UsageError(f"floats up to {peak:g}: it is not known which of them is white")
        return 1.0 if peak <= 1 else 255.0
    # Pillow scales other formats than TIFF to 16 bits.
    bits = _all(tags, "BitsPerSample", 16)[0] if tags else 16
    return float(2**bits - 1)
