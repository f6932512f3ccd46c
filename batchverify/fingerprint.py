"""Embedding settings and the fingerprint that names them: equal fingerprints, comparable vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from batchverify.errors import UsageError

# Raised whenever decoding, detection or resampling changes its result by more than rounding.
PIPELINE = 2
# Raised whenever an augmented view of the same face and number changes.
AUGMENTATION = 1
# Pixels on each side of the faces that backbones take.
FACE_SIZE = 160
CROPS = ("detect", "center", "none")
TTA = ("none", "flip")
# The fixed crop: fractions of width, height, width, height. Fits LFW's deep-funnelled pictures.
CENTER = (0.24, 0.192, 0.76, 0.82)
DEFAULT_MARGIN = 44
# Larger pictures are reduced to this many pixels on their longer side before the crop is taken.
WORKING_SIDE = {"detect": 4096, "center": 1024, "none": 640}
# Faces are searched for in a copy of at most so many pixels, and cut from the larger one.
DETECT_SIDE = 2048
# Which of several faces is meant, by facenet-pytorch's names of the rules.
FACES = {"center": "center_weighted_size", "largest": "largest", "probable": "most_probable"}
SMALLEST_FACES = (12, 1000)


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a face gets from a picture into the network, apart from the network's weights.

    crop: `detect` (MTCNN box, with `margin` of the 160 pixels around it), `center` (fixed fractions) or
    `none` (the whole picture). tta: `flip` averages the vectors of the crop and of its mirror image. view:
    0 for the face as it is, else the number of an augmented view, for training. face: which of several, a
    name of `FACES`. min_face: the smallest face searched for, in pixels of the picture reduced to
    `DETECT_SIDE`; None for 20, or a 24th of the shorter side where that is more.
    """

    crop: str = "detect"
    margin: int = DEFAULT_MARGIN
    tta: str = "none"
    view: int = 0
    face: str = "center"
    min_face: int | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UsageError(f"crop must be one of {', '.join(CROPS)}, got '{self.crop}'")
        if self.tta not in TTA:
            raise UsageError(f"tta must be one of {', '.join(TTA)}, got '{self.tta}'")
        if self.face not in FACES:
            raise UsageError(f"face must be one of {', '.join(FACES)}, got '{self.face}'")
        least, most = SMALLEST_FACES
        if self.min_face is not None and not least <= self.min_face <= most:
            raise UsageError(f"min_face must lie between {least} and {most} pixels, got {self.min_face}")
        # 44.0 would be another document, and so another cache, than 44.
        if not isinstance(self.margin, int) or not 0 <= self.margin <= 120:
            raise UsageError(
                f"margin must be a whole number between 0 and 120 of 160 pixels, got {self.margin!r}"
            )

    @property
    def working_side(self) -> int:
        """The longer side, in pixels, to which larger pictures are reduced before the crop."""
        return WORKING_SIDE[self.crop]


@dataclass(frozen=True)
class EmbeddingFingerprint:
    """Everything that moves a vector, as a JSON document; `id` is its hash and the cache folder's name."""

    document: Mapping[str, Any]

    @classmethod
    def of(cls, backbone: str, settings: EmbeddingSettings) -> EmbeddingFingerprint:
        """The fingerprint of a backbone (by its own fingerprint) under `settings`."""
        crop: dict[str, Any] = {"mode": settings.crop, "working_side": settings.working_side}
        if settings.crop == "detect":
            crop |= {
                "margin": settings.margin,
                "choice": FACES[settings.face],
                "smallest": settings.min_face or "20 or side/24",
                "detect_side": DETECT_SIDE,
            }
        if settings.crop == "center":
            crop |= {"fractions": list(CENTER)}
        # Only where there is one: the fingerprints of plain faces stay what they are.
        augmentation = {"version": AUGMENTATION, "view": settings.view}
        view = {"augmentation": augmentation} if settings.view else {}
        return cls(
            {
                **view,
                "backbone": backbone,
                "crop": crop,
                "size": 160,
                "normalisation": "(x - 127.5) / 128",
                "tta": settings.tta,
                "numbers": "float",
                "dtype": "float16",
                "dimension": 512,
                "pipeline": PIPELINE,
            }
        )

    @cached_property
    def canonical(self) -> str:
        """The document as canonical JSON: the same bytes from every writer."""
        return json.dumps(self.document, sort_keys=True, separators=(",", ":"))

    @cached_property
    def id(self) -> str:
        """The first 32 hex digits of the canonical document's SHA-256."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:32]

    def difference(self, other: EmbeddingFingerprint) -> str:
        """Which settings differ, for people: `crop.margin 44 against 14; …`, empty when equal."""
        mine, theirs = flattened(self.document), flattened(other.document)
        names = sorted(mine.keys() | theirs.keys())
        differing = [name for name in names if mine.get(name) != theirs.get(name)]
        return "; ".join(
            f"{name} {_short(mine.get(name))} against {_short(theirs.get(name))}" for name in differing
        )


def flattened(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested document as one mapping; the keys of inner ones follow after dots."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        # An empty mapping is a value like others, lest a difference go unsaid.
        nested = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"
