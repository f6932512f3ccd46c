"""Small frozen records that the stages pass to one another, and the closed set of failure reasons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Reason(str, Enum):
    """Why an image has no embedding. The set is closed, so readers of the output may rely on it."""

    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    UNREADABLE = "unreadable"
    UNDECODABLE = "undecodable"
    TOO_LARGE = "too_large"
    NO_FACE = "no_face"
    CRASHED = "crashed"


# Reasons that depend on the image's bytes alone. Only these are cached.
CACHED_REASONS = frozenset({Reason.UNDECODABLE, Reason.TOO_LARGE, Reason.NO_FACE})

# Reasons that are those of a file, whichever backbone asks for it.
FILE_REASONS = frozenset(Reason) - {Reason.NO_FACE, Reason.CRASHED}


@dataclass(frozen=True)
class Skipped:
    """An image without an embedding: the reason, and a message for people.

    depends: the limit or decoder set behind a cached reason. The image is tried again when it changes.
    """

    reason: Reason
    message: str = ""
    depends: str = ""


@dataclass(frozen=True)
class Limits:
    """The largest image that is read (`bytes` of the encoded file) and decoded (`pixels`)."""

    bytes: int = 64_000_000
    pixels: int = 100_000_000


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    pixels: (H, W, 3) uint8 RGB, upright, possibly reduced. scale: pixels of the original per pixel of this one.
    """

    pixels: np.ndarray
    scale: float = 1.0
