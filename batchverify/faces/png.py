"""PNG files without the chunks that no pixel depends on: texts, profiles, times, densities."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What pixels and their orientation depend on. Chunks whose name begins with a capital are critical.
_KEPT = (b"tRNS", b"eXIf")


def without_metadata(data: bytes) -> bytes:
    """The file with its critical chunks, transparency and EXIF alone; what is damaged behind a chunk stays as it is.

    Pillow refuses a whole file for a text or a profile of more than 1 MB, and for a wrong checksum or length of
    what it need not read. No chunk is unpacked here.
    """
    pieces, start = [data[:8]], len(SIGNATURE)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            break
        if name[:1].isupper() or (name in _KEPT and _is_whole(data, start, end)):
            pieces.append(data[start:end])
        start = end
    return b"".join([*pieces, data[start:]])


def _is_whole(data: bytes, start: int, end: int) -> bool:
    """Whether the checksum of the chunk at `start` is right."""
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
