"""What surrounds the pixels of an image, held to limits: chunks of a PNG, scans of a JPEG, the header of a PNM."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
# What makes the picture. Other critical chunks change how the pixels are stored, and are in no standard.
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# Texts that may say how the picture is turned: EXIF as ImageMagick writes it, and XMP.
_TURNS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_LONGEST_TEXT = 1_000_000
# A JPEG's EXIF block has no more, and the orientation is at its start.
_LONGEST_EXIF = 65_536
# What ends an entropy-coded segment of a JPEG: a marker that is neither a stuffed zero nor a restart.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")

# The passes of an interlaced PNG: first column and row, steps.
_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
# A file of 64 MB holds a thousand of full length.
_MOST_SEGMENTS = 2000
# Bytes between the segments of a JPEG, of which few files have any, or of the header of a PNM.
_MOST_FILL = 65_536
_PNM, _COMMENT = re.compile(rb"P[0-9fy]"), re.compile(rb"#[^\r\n]*")


def without_metadata(data: bytes) -> bytes:
    """The bytes of an image that the decoder needs; all of them if it is no PNG.

    Of the optional chunks of a PNG only transparency and orientation are kept, and these only whole. Raises
    `ValueError` if a critical chunk is unknown or damaged: then the pixels may be other ones.
    """
    if not data.startswith(PNG):
        return data
    parts, texts = [PNG], _LONGEST_TEXT
    for kind, body, chunk, intact in _chunks(data):
        if kind[:1].isupper():
            if kind not in _CRITICAL:
                raise ValueError(f"a PNG with a critical chunk that is unknown: {kind!r}")
            if not intact and len(chunk) == len(body) + 12:
                raise ValueError(f"a PNG with a wrong checksum in {kind!r}")
            parts.append(chunk)
        elif intact and kind == b"tRNS":
            parts.append(chunk)
        elif intact and kind == b"eXIf":
            parts.append(chunk if len(body) <= _LONGEST_EXIF else _chunk(kind, body[:_LONGEST_EXIF]))
        elif intact and kind in (b"tEXt", b"zTXt", b"iTXt") and body.startswith(_TURNS):
            texts -= len(chunk)
            parts += [chunk] if texts > 0 and _is_short(kind, body) else []
        if kind == b"IEND":
            break
    return b"".join(parts)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """A PNG's chunks: kind, content, all their bytes, and whether they are whole and their checksum is right."""
    start = len(PNG)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + length + 12]
        body = chunk[8 : 8 + length]
        yield kind, body, chunk, chunk[8 + length :] == struct.pack(">I", zlib.crc32(chunk[4 : 8 + length]))
        start += length + 12


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _is_short(kind: bytes, body: bytes) -> bool:
    """Whether a text is short when unpacked, without unpacking more than that."""
    rest = body.split(b"\0", 1)[1]
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(rest) <= _LONGEST_TEXT
    if rest[:1] not in (b"\0", b"\1"):
        return False
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _LONGEST_TEXT)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


def lacks_rows(data: bytes) -> bool:
    """Whether a PNG holds fewer bytes of pixels than its header says. The decoder leaves the missing ones black."""
    width, height, bits, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    depth = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    wanted = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        wanted += rows * (1 + -(-columns * depth // 8)) if columns > 0 and rows > 0 else 0
    unpacker, got = zlib.decompressobj(), 0
    packed = b"".join(body for name, body, _, _ in _chunks(data) if name == b"IDAT")
    while got < wanted and (part := unpacker.decompress(packed, 1 << 20)):
        got, packed = got + len(part), unpacker.unconsumed_tail
    return got < wanted


def scans(data: bytes, enough: int) -> int:
    """How many scans a JPEG has, counted no further than `enough`; 0 for other formats.

    A JPEG of thousands of segments counts as `enough`: the decoder joins EXIF segments in quadratic time. So does one
    with many bytes before its first scan that belong to no segment: Pillow reads them one by one.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    found, position, components = 0, 2, 0
    for segments, (kind, fill, position) in enumerate(_markers(data), 1):
        if not found and fill > _MOST_FILL:
            return enough
        if kind == 0xD9:
            break
        if kind in (0xC0, 0xC1):
            components = data[position + 7] if position + 7 < len(data) else 0
        if kind == 0xDA and components and data[position + 2 : position + 3] == bytes([components]):
            # All components of a baseline JPEG are in one scan: the decoder reads no other.
            return 1
        found += kind == 0xDA
        if found == enough or segments > _MOST_SEGMENTS:
            return enough
        position = _behind(data, position)
    return found if found or len(data) - position <= _MOST_FILL else enough


def lacks_end(data: bytes) -> bool:
    """Whether a JPEG has scans but no end after them. The decoder makes up what is missing, as of a cut download.

    False for other formats.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    scanned = False
    for kind, _, _ in _markers(data):
        if kind == 0xD9 or (kind == 0xD8 and scanned):
            return kind == 0xD8
        scanned |= kind == 0xDA
    return scanned


def _markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The markers of a JPEG: kind, bytes before it that belong to no segment, and where its own segment starts."""
    position = 2
    while marker := _MARKER.search(data, position):
        yield data[marker.end() - 1], marker.start() - position, marker.end()
        position = _behind(data, marker.end())


def _behind(data: bytes, start: int) -> int:
    """Where a segment of a JPEG ends, by its length."""
    return start + int.from_bytes(data[start : start + 2], "big")


def lacks_header(data: bytes) -> bool:
    """Whether the header of a PNM does not end where headers do: Pillow reads it byte by byte."""
    if not _PNM.match(data) or len(data) <= _MOST_FILL:
        return False
    words = _COMMENT.sub(b" ", data[:_MOST_FILL]).split(None, 4)
    # Kind, width and height; bitmaps have no largest value.
    return len(words) < (3 if data[1:2] in b"14" else 4)
