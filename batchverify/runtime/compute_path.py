"""What computed vectors: device, dtype, runtime and batch size, as stored in run records and caches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Between the paths of a run on different kinds of machines.
_SEPARATOR = " + "
# Between those of fused backbones.
_MEMBERS = " | "
_TEXT = re.compile(r"(?P<device>\S+) (?P<dtype>\w+) (?P<runtime>\w+), batches of (?P<batch_size>\d+)")
_REASONS = {
    "int8_float32": "8-bit integers in the layers for which the weights state ranges, float32 in the others",
    "int8_bfloat16": "8-bit integers in the layers for which the weights state ranges, bfloat16 in the others",
    "bfloat16": "this hardware multiplies it, and it has the range of float32",
    "float16": "this GPU does not multiply bfloat16",
    "float32": "requested, or this hardware multiplies no shorter type",
}


@dataclass(frozen=True)
class ComputePath:
    """What computed vectors. device: `cpu`, `cuda` or `cuda:N`.

    For a text of another version, `device` holds all of it, and the other fields are empty.
    """

    device: str
    dtype: str = ""
    runtime: str = ""
    batch_size: int = 0

    def __str__(self) -> str:
        if not self.runtime:
            return self.device
        return f"{self.device} {self.dtype} {self.runtime}, batches of {self.batch_size}"

    @classmethod
    def parse(cls, text: str) -> ComputePath:
        """The inverse of `str`."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(match["device"], match["dtype"], match["runtime"], int(match["batch_size"]))

    @property
    def device_kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    def same_vectors(self, other: ComputePath) -> bool:
        """Whether both compute the same vectors, whatever the number of the GPU and the batch size."""
        mine, theirs = ((path.device_kind, path.dtype, path.runtime) for path in (self, other))
        return mine == theirs

    @property
    def reason(self) -> str:
        """Why this path was chosen, for people; empty for a text of another version."""
        if not self.runtime:
            return ""
        runtime = "OpenVINO" if self.runtime == "openvino" else self.runtime
        graph = ", recorded as a CUDA graph" if self.device_kind == "cuda" else ""
        return f"{_REASONS.get(self.dtype, self.dtype)}; {runtime}{graph}"


def paths_to_text(paths: Iterable[ComputePath]) -> str:
    """Several paths as one text, sorted and without duplicates; empty for none."""
    return _SEPARATOR.join(sorted({str(path) for path in paths}))


def paths_from_text(text: str) -> list[ComputePath]:
    """The inverse of `paths_to_text`."""
    return [ComputePath.parse(part) for part in text.split(_SEPARATOR) if part]


def members_to_text(texts: Sequence[str]) -> str:
    """The texts of the paths of fused backbones, in order, as one; empty if all are."""
    return _MEMBERS.join(texts) if any(texts) else ""


def shown_members(text: str) -> str:
    """The different parts of such a text, for people: a backbone whose vectors were all cached has none."""
    return _MEMBERS.join(dict.fromkeys(part for part in text.split(_MEMBERS) if part))


def members_from_text(text: str, count: int) -> list[str]:
    """The inverse of `members_to_text` for `count` backbones."""
    texts = text.split(_MEMBERS)
    return texts if len(texts) == count else [text] + [""] * (count - 1)
