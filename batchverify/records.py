"""Small frozen records that the stages hand each other, and the closed set of reasons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Reason(str, Enum):
    """Why an image has no embedding. The set is closed: readers of the output may rely on it."""

    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    UNREADABLE = "unreadable"
    UNDECODABLE = "undecodable"
    TOO_LARGE = "too_large"
    NO_FACE = "no_face"
    CRASHED = "crashed"


# Reasons that follow from the image's bytes alone; only these are kept in the cache.
CACHED_REASONS = frozenset({Reason.UNDECODABLE, Reason.TOO_LARGE, Reason.NO_FACE})


@dataclass(frozen=True)
class Skipped:
    """An image without an embedding: the reason, and a sentence for whoever looks into it.

    `depends` names the limit or decoder set behind a reason that is cached; under another one the image
    is tried again.
    """

    reason: Reason
    message: str = ""
    depends: str = ""


@dataclass(frozen=True)
class Limits:
    """The largest image that is read (`bytes`, of the encoded file) and decoded (`pixels`)."""

    bytes: int = 64_000_000
    pixels: int = 100_000_000


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    pixels: (H, W, 3) uint8 RGB, upright, perhaps reduced. scale: pixels of the original per pixel here.
    """

    pixels: np.ndarray
    scale: float = 1.0
