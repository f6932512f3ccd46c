"""TIFF files of any depth and meaning, written byte by byte from the specification (TIFF 6.0)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE = 0, 1, 2, 3


@dataclass(frozen=True)
class Tiff:
    """How samples are written. extra: what further samples mean (1 premultiplied alpha, 2 alpha).

    other: further tags of 16-bit values, or in place of those above; None leaves a tag out.
    """

    bits: int = 8
    sample_format: int = UNSIGNED
    photometric: int = BLACK_IS_ZERO
    planar: bool = False
    order: str = "<"
    fill_order: int = 1
    extra: tuple[int, ...] = ()
    palette: tuple[int, ...] = ()
    other: Mapping[int, tuple[int, ...] | None] = field(default_factory=dict)

    def write(self, samples: np.ndarray) -> bytes:
        """A file of (H, W, C) samples in one strip, or in one strip a channel."""
        height, width, count = samples.shape
        planes = [samples[:, :, i : i + 1] for i in range(count)] if self.planar else [samples]
        strips = [self._pack(plane) for plane in planes]
        tags = {
            256: ("H", [width]),
            257: ("H", [height]),
            258: ("H", [self.bits] * count),
            259: ("H", [1]),
            262: ("H", [self.photometric]),
            266: ("H", [self.fill_order]),
            273: ("I", [0] * len(strips)),
            277: ("H", [count]),
            278: ("H", [height]),
            279: ("I", [len(strip) for strip in strips]),
            284: ("H", [2 if self.planar else 1]),
            339: ("H", [self.sample_format] * count),
        }
        if self.extra:
            tags[338] = ("H", list(self.extra))
        if self.palette:
            tags[320] = ("H", list(self.palette))
        tags |= {tag: ("H", list(values)) for tag, values in self.other.items() if values is not None}
        return self._file({tag: tags[tag] for tag in tags if self.other.get(tag, ()) is not None}, strips)

    def _pack(self, plane: np.ndarray) -> bytes:
        rows = plane.reshape(plane.shape[0], -1)
        if self.sample_format == FLOAT:
            return rows.astype(f"{self.order}f{self.bits // 8}").tobytes()
        if self.bits in (8, 16, 32):
            kind = "i" if self.sample_format == SIGNED else "u"
            packed = rows.astype(f"{self.order}{kind}{self.bits // 8}").view(np.uint8).reshape(len(rows), -1)
        else:
            shifts = np.arange(self.bits - 1, -1, -1)
            bits = (rows[:, :, None].astype(np.int64) >> shifts) & 1
            packed = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1)
        if self.fill_order == 2:
            packed = np.packbits(np.unpackbits(packed, axis=1, bitorder="little"), axis=1)
        return packed.tobytes()

    def _file(self, tags: dict[int, tuple[str, list[int]]], strips: list[bytes]) -> bytes:
        order = self.order
        data_at = 8 + 2 + 12 * len(tags) + 4
        long_values, entries = b"", []
        size = {tag: struct.calcsize(f"={len(v)}{k}") for tag, (k, v) in tags.items()}
        strips_at = data_at + sum(each for each in size.values() if each > 4)
        if 273 in tags:
            tags[273] = ("I", [strips_at + sum(map(len, strips[:i])) for i in range(len(strips))])
        for tag, (kind, values) in sorted(tags.items()):
            block = struct.pack(f"{order}{len(values)}{kind}", *values)
            head = struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values))
            if len(block) > 4:
                entries.append(head + struct.pack(f"{order}I", data_at + len(long_values)))
                long_values += block
            else:
                entries.append(head + block.ljust(4, b"\0"))
        mark = b"II*\0" if order == "<" else b"MM\0*"
        start = mark + struct.pack(f"{order}IH", 8, len(tags)) + b"".join(entries) + bytes(4)
        return start + long_values + b"".join(strips)
