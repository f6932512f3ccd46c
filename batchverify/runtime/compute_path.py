"""What computed vectors: device, dtype, runtime and batch size, as run records and caches state it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Between the paths of a run whose machines are of several kinds.
_SEPARATOR = " + "
_TEXT = re.compile(r"(?P<device>\S+) (?P<dtype>\w+) (?P<runtime>\w+), batches of (?P<batch_size>\d+)")
_REASONS = {
    "int8_float32": "8-bit integers in the layers whose ranges the weights state, float32 in the others",
    "int8_bfloat16": "8-bit integers in the layers whose ranges the weights state, bfloat16 in the others",
    "bfloat16": "multiplied in hardware here, with float32's range",
    "float16": "this GPU multiplies no bfloat16",
    "float32": "asked for, or nothing shorter is multiplied here",
}


@dataclass(frozen=True)
class ComputePath:
    """What computed vectors. device: `cpu`, `cuda` or `cuda:N`.

    Of a text that another version wrote `device` holds all, and the rest is empty.
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
        """The path that a run record or a job's state holds as `str` wrote it."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(match["device"], match["dtype"], match["runtime"], int(match["batch_size"]))

    @property
    def device_kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    def same_vectors(self, other: ComputePath) -> bool:
        """Whether both give one vector. Which GPU it is does not matter; one short of memory halves its batch."""
        mine, theirs = ((each.device_kind, each.dtype, each.runtime) for each in (self, other))
        return mine == theirs

    @property
    def reason(self) -> str:
        """Why this path is taken, for people; nothing for a text of another version."""
        if not self.runtime:
            return ""
        runtime = "OpenVINO" if self.runtime == "openvino" else self.runtime
        graph = ", recorded as a CUDA graph" if self.device_kind == "cuda" else ""
        return f"{_REASONS.get(self.dtype, self.dtype)}; {runtime}{graph}"


def paths_to_text(paths: Iterable[ComputePath]) -> str:
    """Several paths, each once, in the order of their texts; empty for none."""
    return _SEPARATOR.join(sorted({str(path) for path in paths}))


def paths_from_text(text: str) -> list[ComputePath]:
    """The paths that `paths_to_text` wrote."""
    return [ComputePath.parse(each) for each in text.split(_SEPARATOR) if each]
