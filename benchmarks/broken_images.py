"""Broken images of every kind, each with the reason that its rows must state."""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from tiff_samples import FLOAT, SIGNED, WHITE_IS_ZERO, Tiff

MEGABYTES = 65
# Makes one broken image out of the bytes of a JPEG at a path whose suffix it may change; returns the manifest's cell.
Break = Callable[[Path, bytes], str]


@dataclass(frozen=True)
class Kind:
    """A kind of broken image, the reason of its rows, and what makes one."""

    name: str
    reason: str
    make: Break


def kinds(crop: str) -> list[Kind]:
    """All kinds; without a detector every picture has a face."""
    found = [
        *(Kind(name, "not_found", make) for name, make in _absent()),
        *(Kind(name, "forbidden", make) for name, make in _outside()),
        *(Kind(name, "unreadable", make) for name, make in _unreadable()),
        *(Kind(name, "undecodable", _written(make)) for name, make in _damaged()),
        *(Kind(name, "undecodable", _written(make)) for name, make in _odd_tiffs()),
        *(Kind(name, "too_large", _written(make)) for name, make in _bombs()),
        Kind(f"a file of {MEGABYTES} MB", "too_large", _large_file),
    ]
    return found + [Kind("a picture without a face", "no_face", _written(_faceless))] * (crop == "detect")


def _absent() -> list[tuple[str, Break]]:
    return [
        ("no such file", lambda path, _: f"gone/{path.name}"),
        ("below a file", lambda path, data: f"{_write(path, data)}/{path.name}"),
        ("an empty cell", lambda *_: ""),
        ("a link to nothing", lambda path, _: _link(path, "gone.jpg")),
    ]


def _outside() -> list[tuple[str, Break]]:
    return [
        ("above the image root", lambda path, _: f"../{path.name}"),
        ("elsewhere on the disk", lambda path, _: f"/etc/{path.name}"),
        ("a web address", lambda path, _: f"https://example.com/{path.name}"),
        ("an unknown scheme", lambda path, _: f"gopher://example.com/{path.name}"),
        ("a data URI", lambda path, _: f"data:image/jpeg;base64,{path.stem}"),
        ("a bucket outside the root", lambda path, _: f"s3://bucket/{path.name}"),
        ("a link out of the root", lambda path, _: _link(path, "/etc/hostname")),
    ]


def _unreadable() -> list[tuple[str, Break]]:
    return [
        ("a folder", _folder),
        ("a pipe", _pipe),
        ("a link to itself", lambda path, _: _link(path, path.name)),
        ("a name of 300 letters", lambda path, _: f"{path.stem:x>300}.jpg"),
    ]


def _damaged() -> list[tuple[str, Callable[[bytes], bytes]]]:
    return [
        ("a JPEG cut after 2 bytes", lambda data: data[:2]),
        ("a JPEG cut in its header", lambda data: data[:20]),
        ("a JPEG cut in its tables", lambda data: data[: data.index(b"\xff\xc0")]),
        ("a JPEG cut at a third", lambda data: data[: len(data) // 3]),
        ("a JPEG cut at nine tenths", lambda data: data[: len(data) * 9 // 10]),
        ("a JPEG without its first bytes", lambda data: data[4:]),
        ("a PNG cut in half", lambda data: (png := _saved(data, "PNG"))[: len(png) // 2]),
        ("a PNG with a wrong checksum", lambda data: _flip(_saved(data, "PNG"), 29)),
        ("a WebP cut in half", lambda data: (webp := _saved(data, "WEBP"))[: len(webp) // 2]),
        ("a GIF without pixels", lambda data: _saved(data, "GIF")[:13]),
        ("an empty file", lambda _: b""),
        ("text", lambda data: f"no picture but {zlib.crc32(data)}".encode()),
        ("a web page", lambda data: f"<!DOCTYPE html><html>{zlib.crc32(data)}</html>".encode()),
        ("zeros", lambda data: bytes(len(data))),
        ("a Photoshop file", lambda data: b"8BPS\0\1" + data),
    ]


def _odd_tiffs() -> list[tuple[str, Callable[[bytes], bytes]]]:
    return [
        ("a TIFF of signed samples", lambda data: _tiff(data, Tiff(16, SIGNED))),
        ("a TIFF of floats in which white is 0", lambda data: _tiff(data, Tiff(32, FLOAT, WHITE_IS_ZERO))),
        ("a TIFF of 16 bits in reverse", lambda data: _tiff(data, Tiff(16, fill_order=2))),
        ("a TIFF of 7 bits", lambda data: _tiff(data, Tiff(7))),
        ("a TIFF that does not say what it means", lambda data: _tiff(data, Tiff(8, other={262: None}))),
        ("a TIFF cut in half", lambda data: (tiff := _tiff(data, Tiff(8)))[: len(tiff) // 2]),
    ]


def _bombs() -> list[tuple[str, Callable[[bytes], bytes]]]:
    return [
        ("a PNG of 20,000 x 20,000 pixels", _png_bomb),
        ("a JPEG that says 65,000 x 65,000", _jpeg_bomb),
        ("a JPEG of 201 scans", _scan_bomb),
    ]


def _written(change: Callable[[bytes], bytes]) -> Break:
    return lambda path, data: _write(path, change(data))


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return path.name


def _link(path: Path, target: str) -> str:
    path.symlink_to(target)
    return path.name


def _folder(path: Path, _: bytes) -> str:
    path.mkdir()
    return path.name


def _pipe(path: Path, _: bytes) -> str:
    os.mkfifo(path)
    return path.name


def _large_file(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    os.truncate(path, MEGABYTES * 1_000_000)
    return path.name


def _saved(data: bytes, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def _tiff(data: bytes, tiff: Tiff) -> bytes:
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((80, 80)))[:, :, None]
    return tiff.write(grey // 2 if tiff.bits == 7 else grey)


def _png_bomb(data: bytes) -> bytes:
    """A whole one, of one bit a pixel: 50 kB that become 1.2 GB of RGB."""
    side = 20_000
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tEXt", b"from\0" + str(zlib.crc32(data)).encode()),
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _jpeg_bomb(data: bytes) -> bytes:
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 65_000, 65_000) + data[place + 4 :]


def _scan_bomb(data: bytes) -> bytes:
    """A progressive JPEG whose last scan is there two hundred times."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("L").save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * 200 + whole[-2:]


def _faceless(data: bytes) -> bytes:
    colour = zlib.crc32(data)
    buffer = io.BytesIO()
    Image.new("RGB", (250, 250), (colour & 255, colour >> 8 & 255, colour >> 16 & 255)).save(buffer, "JPEG")
    return buffer.getvalue()
