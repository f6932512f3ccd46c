"""Embedding settings and their fingerprint. Vectors are comparable if their fingerprints are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from batchverify.errors import UsageError

# Incremented when decoding, detection or resampling changes results by more than rounding.
PIPELINE = 2
# Incremented when the augmented view of a face changes for the same view number.
AUGMENTATION = 1
# The square faces of InceptionResnetV1: their side in pixels, and how they are scaled. `--margin` is in pixels of
# such a face, whatever the side of a backbone's own.
FACE_SIZE = 160
NORMALISATION = "(x - 127.5) / 128"
# Numbers of its vectors, and of any backbone's.
DIMENSION = 512
DIMENSIONS = (64, 2048)
CROPS = ("detect", "align", "center", "none")
DETECTORS = ("mtcnn", "retinaface")
# Where the five points lie in an aligned face: x y of each, in pixels; or by name (`faces/alignment.py`).
Points = tuple[tuple[float, float], ...]
DEFAULT_TEMPLATE = "vggface2"
TTA = ("none", "flip")
# The fixed crop: left, top, right, bottom, as fractions of the image. It fits LFW's deep-funnelled images.
CENTER = (0.24, 0.192, 0.76, 0.82)
DEFAULT_MARGIN = 44
MOST_MARGIN = 120
# Larger images are reduced to this many pixels on their longer side before the crop is taken.
WORKING_SIDE = {"detect": 4096, "align": 4096, "center": 1024, "none": 640}
# Faces are detected in a copy whose longer side has at most this many pixels, and cut from the larger image.
DETECT_SIDE = 2048
# Rules that choose one of several faces, with facenet-pytorch's names for them.
FACES = {"center": "center_weighted_size", "largest": "largest", "probable": "most_probable"}
SMALLEST_FACES = (12, 1000)
# What the document says of the choice of a face by default.
DEFAULT_CHOICE = {"choice": FACES["center"], "smallest": "20 or side/24"}

# The settings that users choose.
CHOSEN = ("crop", "margin", "tta", "face", "min_face", "detector")
# The key of the documents of fused backbones.
FUSION = "fusion"
# Backbones of one fusion: its head holds a calibration for every combination of them.
MOST_FUSED = 6


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a face gets from an image into the network, apart from the network's weights.

    crop: `detect` (the detector's box with a margin of `margin` of the 160 pixels), `align` (the detector's five
    points moved to those of `template`, a name or points in pixels of the face), `center` (fixed fractions) or `none`
    (the whole image). detector: a name in `DETECTORS`. tta: `flip` averages the vectors of the crop and its
    mirror image. view: 0 for the face itself, otherwise the number of an augmented view, for training. face: which of
    several faces to take, a key of `FACES`. min_face: smallest face to detect, in pixels of the image reduced to
    `DETECT_SIDE`; None for 20, or a 24th of the shorter side if that is larger.
    """

    crop: str = "detect"
    margin: int = DEFAULT_MARGIN
    tta: str = "none"
    view: int = 0
    face: str = "center"
    min_face: int | None = None
    detector: str = DETECTORS[0]
    template: str | Points = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        choices_of = (("crop", CROPS), ("tta", TTA), ("face", FACES), ("detector", DETECTORS))
        for name, choices in choices_of:
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        least, most = SMALLEST_FACES
        if self.min_face is not None and not least <= self.min_face <= most:
            raise UsageError(f"min_face must lie between {least} and {most} pixels, got {self.min_face}")
        # 44.0 would give another document than 44, and so another cache.
        if not isinstance(self.margin, int) or not 0 <= self.margin <= MOST_MARGIN:
            raise UsageError(
                f"margin must be a whole number between 0 and {MOST_MARGIN} of 160 pixels, got {self.margin!r}"
            )

        if self.crop == "align" and self.detector == "mtcnn":
            raise UsageError(
                "--crop align needs --detector retinaface: the landmarks of mtcnn are wrong where a face touches the "
                "edge of the image"
            )

    @property
    def detects(self) -> bool:
        """Whether the crop needs a detector."""
        return self.crop in ("detect", "align")

    @property
    def working_side(self) -> int:
        """The longer side, in pixels, to which larger images are reduced before the crop."""
        return WORKING_SIDE[self.crop]


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone takes and gives.

    fingerprint: of its weights and of whatever else changes its vectors. size: side of a face in pixels. dimension:
    numbers of a vector. normalisation: how pixels are scaled, for the embedding's fingerprint. defaults: the settings
    that it was trained with.
    """

    fingerprint: str
    size: int = FACE_SIZE
    dimension: int = DIMENSION
    normalisation: str = NORMALISATION
    defaults: EmbeddingSettings = field(default_factory=EmbeddingSettings)

    def settings(self, **given: Any) -> EmbeddingSettings:
        """The given settings; its own in place of those that are None."""
        return replace(self.defaults, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class EmbeddingFingerprint:
    """Everything that affects a vector, as a JSON document; `id`, its hash, names the cache folder."""

    document: Mapping[str, Any]

    @classmethod
    def of(cls, backbone: BackboneSpec | str, settings: EmbeddingSettings) -> EmbeddingFingerprint:
        """The fingerprint of a backbone under `settings`; a text is that of an InceptionResnetV1."""
        spec = BackboneSpec(backbone) if isinstance(backbone, str) else backbone
        crop: dict[str, Any] = {"mode": settings.crop, "working_side": settings.working_side}
        if settings.crop == "detect":
            crop |= {"margin": settings.margin}
        if settings.crop == "align":
            named = isinstance(settings.template, str)
            crop |= {"template": settings.template if named else [list(point) for point in settings.template]}
        if settings.detects:
            # MTCNN is not named, so that the fingerprints of its faces stay as they were before there was a choice.
            crop |= {"detector": settings.detector} if settings.detector != "mtcnn" else {}
            crop |= {
                "choice": FACES[settings.face],
                "smallest": settings.min_face or DEFAULT_CHOICE["smallest"],
                "detect_side": DETECT_SIDE,
            }
        if settings.crop == "center":
            crop |= {"fractions": list(CENTER)}
        # Added for views alone, so that the fingerprints of plain faces stay unchanged.
        augmentation = {"version": AUGMENTATION, "view": settings.view}
        view = {"augmentation": augmentation} if settings.view else {}
        return cls(
            {
                **view,
                "backbone": spec.fingerprint,
                "crop": crop,
                "size": spec.size,
                "normalisation": spec.normalisation,
                "tta": settings.tta,
                "numbers": "float",
                "dtype": "float16",
                "dimension": spec.dimension,
                "pipeline": PIPELINE,
            }
        )

    @classmethod
    def fused(cls, members: Sequence[EmbeddingFingerprint]) -> EmbeddingFingerprint:
        """The fingerprint of several backbones together, whatever their order; `UsageError` if two are the same."""
        if len({member.id for member in members}) < len(members):
            raise UsageError("--backbone: two of the backbones that + joins are the same")
        ordered = sorted(members, key=lambda member: member.id)
        return cls({FUSION: {str(number): dict(each.document) for number, each in enumerate(ordered, 1)}})

    @property
    def members(self) -> list[EmbeddingFingerprint]:
        """The fingerprints of fused backbones, sorted by their ids; only itself of a single one."""
        stored = self.document.get(FUSION)
        documents = list(stored.values()) if isinstance(stored, Mapping) else []
        known = [EmbeddingFingerprint(each) for each in documents if isinstance(each, Mapping)]
        return sorted(known, key=lambda each: each.id) or [self]

    @property
    def size(self) -> int:
        """The side of a face in pixels."""
        return int(self.document.get("size", FACE_SIZE))

    @property
    def dimension(self) -> int:
        """The numbers of a vector."""
        return int(self.document.get("dimension", DIMENSION))

    @cached_property
    def canonical(self) -> str:
        """The document as canonical JSON: the same bytes from every writer."""
        return json.dumps(self.document, sort_keys=True, separators=(",", ":"))

    @cached_property
    def id(self) -> str:
        """The first 32 hex digits of the canonical document's SHA-256."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:32]

    def with_default_choice(self) -> EmbeddingFingerprint:
        """The same embeddings of the faces that are taken by default.

        The choice of a face decides which face a vector shows, not what a vector of that face is.
        """
        if FUSION in self.document:
            return self.fused([member.with_default_choice() for member in self.members])
        crop = self.document.get("crop")
        if not isinstance(crop, Mapping):
            return self
        chosen = {name: DEFAULT_CHOICE.get(name, value) for name, value in crop.items()}
        return EmbeddingFingerprint({**self.document, "crop": chosen})

    def difference(self, other: EmbeddingFingerprint) -> str:
        """Which settings differ, for people: `crop.margin 44 against 14; …`; empty if none do."""
        entries = differing(self.document, other.document)
        return "; ".join(f"{name} {_short(mine)} against {_short(theirs)}" for name, mine, theirs in entries)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two nested documents differ: names as those of `flattened`, sorted, with both values, None for none."""
    first, second = flattened(one), flattened(other)
    pairs = [(name, first.get(name), second.get(name)) for name in sorted(first.keys() | second.keys())]
    return [pair for pair in pairs if pair[1] != pair[2]]


def flattened(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested document as one mapping, with keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        # An empty mapping counts as a value, or a difference could be missed.
        nested = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"
