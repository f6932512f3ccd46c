"""The description of a backbone in a file of another project: which faces it takes, and how their pixels are scaled.

It is a JSON document in `FILE.json` beside `FILE.onnx`, or in the model's metadata. A wrong order of colours or a
wrong scale costs accuracy without any error, so neither is ever guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from batchverify.errors import ArtifactError, shortened
from batchverify.faces.alignment import TEMPLATES
from batchverify.fingerprint import (
    CROPS,
    DEFAULT_MARGIN,
    DEFAULT_TEMPLATE,
    MOST_MARGIN,
    EmbeddingSettings,
    Points,
)

COLOURS = ("RGB", "BGR")
SIZES = (32, 512)
# Beyond this neither side of a scale makes sense: pixels lie between 0 and 255.
LARGEST = 1e6
MOST_TEXT = 1000
MOST_OUTPUT = 4096
# Of eyes, and of the mouth and the eyes, in sides of the face. Shares in place of pixels are nearer.
_LEAST_APART = 1 / 20
_POINTS = (
    "five [x, y] in pixels of the face: left and right eye as seen in the image, nose, left and right "
    "corner of the mouth"
)
REQUIRED = ("crop", "size", "colour", "mean", "scale")
# Some models scale pixels themselves; of InsightFace's those with a subtraction and a multiplication among the first
# nodes.
_RAW = {"mean": 0, "scale": 1}
_ARCFACE = {
    "crop": "align",
    "template": "arcface",
    "size": 112,
    "colour": "RGB",
    "mean": 127.5,
    "scale": 127.5,
}
# What the projects that publish these models do with a face, from their sources.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "insightface": _ARCFACE,
    # Two outputs, the embedding and its length.
    "adaface": {**_ARCFACE, "colour": "BGR", "output": 0},
    "sface": {**_ARCFACE, **_RAW},
    "edgeface": _ARCFACE,
    "0095": {**_ARCFACE, "template": "reid-0095", "size": 128, "colour": "BGR", **_RAW},
    "facenet": {"crop": "detect", "size": 160, "colour": "RGB", "mean": 127.5, "scale": 128},
}


@dataclass(frozen=True)
class Description:
    """The faces that a backbone takes.

    crop: as `--crop`. template: of `align`, a name or five points in pixels of the face. margin: of `detect`, in
    pixels of a face of 160. size: side of the square face in pixels. colour: order of the channels, `RGB` or `BGR`.
    mean, scale: of each channel in this order; the network takes (pixel - mean) / scale, with pixels from 0 to 255.
    output: name or number of the output with the vectors; None if there is only one. licence, source: texts for
    people.
    """

    crop: str
    size: int
    colour: str
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]
    template: str | Points = ""
    margin: int = DEFAULT_MARGIN
    output: str | int | None = None
    licence: str = ""
    source: str = ""

    @classmethod
    def parse(cls, document: Any, name: str, first_nodes: Sequence[tuple[str, str]] = ()) -> Description:
        """Check a document. name: of its file, for messages. first_nodes: of the model, for InsightFace's preset.

        Raises `ArtifactError` that says what is missing, unknown or wrong.
        """
        if not isinstance(document, Mapping):
            raise ArtifactError(f"{name}: a description is a JSON object, got {_shown(document)}")
        known = {field.name for field in fields(cls)} | {"preset"}
        if unknown := sorted(map(str, document.keys() - known)):
            listed = ", ".join(sorted(known))
            raise ArtifactError(f"{name}: unknown key {_shown(unknown[0])}; a description has {listed}")
        given = {key: value for key, value in document.items() if value is not None}
        values = {**_preset(given.pop("preset", None), name, first_nodes), **given}
        if "template" not in given:
            values = _with_own_template(values)
        if missing := [key for key in REQUIRED if key not in values]:
            raise ArtifactError(f"{name}: still to be filled in: {', '.join(missing)}")
        return cls(**{key: _checked(name, key, value) for key, value in values.items()})._with_template(name)

    def _with_template(self, name: str) -> Description:
        if self.crop == "align" and not self.template:
            raise ArtifactError(f"{name}: crop align needs a template: {', '.join(TEMPLATES)}")
        if self.crop != "align" and self.template:
            raise ArtifactError(f"{name}: a template goes with crop align, not with {self.crop}")
        if not isinstance(self.template, str) and not _is_face(self.template, self.size):
            raise ArtifactError(f"{name}: the points of the template are not those of a face: {_POINTS}")
        return self

    @property
    def normalisation(self) -> str:
        """How pixels become the network's input, for people and for the fingerprint."""
        if self.mean == (0, 0, 0) and self.scale == (1, 1, 1):
            return f"x, {self.colour}"
        return f"(x - {_numbers(self.mean)}) / {_numbers(self.scale)}, {self.colour}"

    @property
    def settings(self) -> EmbeddingSettings:
        """How a face is cut out for this backbone, unless the user says otherwise."""
        # The landmarks of MTCNN are not good enough to align a face by.
        detector, template = ("retinaface", self.template) if self.crop == "align" else ("mtcnn", None)
        return EmbeddingSettings(self.crop, self.margin, detector=detector, template=template or DEFAULT_TEMPLATE)

    @property
    def identity(self) -> str:
        """What changes vectors, apart from the crop, as canonical JSON."""
        parts = {"colour": self.colour, "mean": self.mean, "scale": self.scale, "output": self.output}
        return json.dumps(parts, sort_keys=True)


def form(size: int | None, outputs: Sequence[str]) -> str:
    """A description to fill in, with what the model itself tells: the side of its faces and its outputs' names."""
    keys = ("crop", "template", "size", "colour", "mean", "scale", "output", "licence", "source")
    known = {"size": size, "output": outputs[0] if len(outputs) == 1 else None}
    return json.dumps(dict.fromkeys(keys) | known, indent=1)


def _preset(preset: Any, name: str, first_nodes: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    if preset is None:
        return {}
    if preset not in list(PRESETS):
        raise ArtifactError(f"{name}: preset must be one of {', '.join(PRESETS)}, got {_shown(preset)}")
    if preset == "insightface" and _scales_itself(first_nodes):
        return {**PRESETS[preset], **_RAW}
    return PRESETS[preset]


def _with_own_template(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the template that a preset means: none without `align`, for 128 pixels InsightFace's second."""
    values, size = dict(values), values.get("size")
    if values.get("crop") != "align":
        values.pop("template", None)
    elif values.get("template") == "arcface" and size in (128, 256, 512):
        values["template"] = "arcface-128"
    return values


def _scales_itself(first_nodes: Sequence[tuple[str, str]]) -> bool:
    """Whether a subtraction and a multiplication are among the first nodes: InsightFace's own test."""
    return all(
        any(node.startswith(names) or kind == names[0] for node, kind in first_nodes)
        for names in (("Sub", "_minus"), ("Mul", "_mul"))
    )


def _checked(name: str, key: str, value: Any) -> Any:
    """The value of a key as `Description` has it; `ArtifactError` for one that makes no sense."""
    rule, must_be = _RULES[key]
    result = rule(value)
    if result is None:
        raise ArtifactError(f"{name}: {key} must be {must_be}, got {_shown(value)}")
    return result


def _choice(*choices: str) -> Callable[[Any], str | None]:
    return lambda value: value if isinstance(value, str) and value in choices else None


def _whole(least: int, most: int) -> Callable[[Any], int | None]:
    return lambda value: value if type(value) is int and least <= value <= most else None


def _channels(positive: bool) -> Callable[[Any], tuple[float, ...] | None]:
    """One number for all channels, or a list of three."""

    def check(value: Any) -> tuple[float, ...] | None:
        values = value if isinstance(value, list | tuple) else [value] * 3
        if len(values) != 3 or not all(type(each) in (int, float) for each in values):
            return None
        if not all(abs(each) <= LARGEST and (each > 1 / LARGEST or not positive) for each in values):
            return None
        return tuple(map(float, values))

    return check


def _output(value: Any) -> str | int | None:
    if isinstance(value, str):
        return value if 0 < len(value) <= MOST_TEXT else None
    return _whole(0, MOST_OUTPUT)(value)


def _template(value: Any) -> str | Points | None:
    """A name, or five points as lists of two numbers."""
    if not isinstance(value, list | tuple):
        return _choice(*TEMPLATES)(value)
    points = [tuple(point) if isinstance(point, list | tuple) else () for point in value]
    numbers = [number for point in points for number in point]
    if [len(point) for point in points] != [2] * 5:
        return None
    if not all(type(each) in (int, float) and abs(each) <= LARGEST for each in numbers):
        return None
    return tuple((float(x), float(y)) for x, y in points)


def _is_face(points: Points, size: int) -> bool:
    """Whether five points can be those of an upright face in a crop of `size` pixels, in the order of templates."""
    (left, top), (right, _), _, (left_corner, bottom), (right_corner, _) = points
    near = all(-size <= each <= 2 * size for point in points for each in point)
    least = size * _LEAST_APART
    return near and right - left >= least and right_corner - left_corner >= least and bottom - top >= least


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= MOST_TEXT else None


# For each key: the check, which gives the value or None, and what it asks for, in words.
_RULES: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "crop": (_choice(*CROPS), f"one of {', '.join(CROPS)}"),
    "template": (_template, f"one of {', '.join(TEMPLATES)}, or {_POINTS}"),
    "margin": (_whole(0, MOST_MARGIN), f"a whole number from 0 to {MOST_MARGIN}"),
    "size": (_whole(*SIZES), f"a whole number from {SIZES[0]} to {SIZES[1]}"),
    "colour": (_choice(*COLOURS), " or ".join(COLOURS)),
    "mean": (_channels(False), "a number, or a list of three"),
    "scale": (_channels(True), "a positive number, or a list of three"),
    "output": (_output, "the name or the number of an output"),
    "licence": (_text, f"a text of at most {MOST_TEXT:,} characters"),
    "source": (_text, f"a text of at most {MOST_TEXT:,} characters"),
}


def _numbers(values: Sequence[float]) -> str:
    """One number if all are equal, else a list of them."""
    texts = [f"{value!r}".removesuffix(".0") for value in values]
    return texts[0] if len(set(texts)) == 1 else f"[{', '.join(texts)}]"


def _shown(value: Any) -> str:
    return shortened(repr(value), 60)
