"""Decoding: what is no image, limits of size and memory, and damaged files by the hundred."""

import random
import struct
import subprocess
import sys
import warnings
import zlib

import pytest
from bad_images import bad_images, encoded
from PIL import Image

from batchverify.faces.images import decode, decoder_set, own_process, too_large_dependence
from batchverify.records import DecodedImage, Limits, Reason, Skipped

LIMITS = Limits()


def reason(data: bytes, limits: Limits = LIMITS) -> Skipped:
    result = decode(data, limits, 640)
    assert isinstance(result, Skipped)
    assert "0x" not in result.message
    assert 0 < len(result.message) < 200
    return result


def portrait() -> Image.Image:
    """A smooth picture, 120 x 80: compressed data in every format, but little of it."""
    return Image.linear_gradient("L").resize((120, 80)).convert("RGB")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"image_a,image_b\nx.jpg,y.jpg\n",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["empty", "text", "jpeg start", "eps", "svg"],
)
def test_what_is_no_image(data):
    skipped = reason(data)
    assert skipped.reason is Reason.UNDECODABLE
    assert skipped.depends == decoder_set()
    assert ("empty" in skipped.message) == (data == b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_undecodable(kind):
    data = encoded(portrait(), kind)
    assert reason(data[: len(data) // 2]).reason is Reason.UNDECODABLE


def test_the_limit_itself_is_allowed():
    data = encoded(Image.new("RGB", (20, 10)), "PNG")
    assert isinstance(decode(data, Limits(pixels=200), 64), DecodedImage)
    skipped = reason(data, Limits(pixels=199))
    assert skipped.reason is Reason.TOO_LARGE
    assert skipped.depends == too_large_dependence(Limits(pixels=199)) == "199 pixels"
    assert "20 x 10 pixels" in skipped.message


def png(width: int, height: int) -> bytes:
    """A 1-bit PNG of any size in a few bytes: its pixels are missing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


LITTLE_MEMORY = """
import resource, sys
from batchverify.faces.images import decode, own_process
from batchverify.records import Limits
own_process()
huge, large = sys.argv[1:]
decode(open(large, "rb").read()[:60], Limits(), 640)  # plug-ins are loaded
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (48 << 20), now + (48 << 20)))
print(decode(open(huge, "rb").read(), Limits(), 640).reason.value)
try:
    print(decode(open(large, "rb").read(), Limits(), 640))
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
def test_huge_pictures_are_refused_unread_and_want_of_memory_is_no_fault_of_the_image(tmp_path):
    (tmp_path / "huge.png").write_bytes(png(10_001, 10_001))
    (tmp_path / "large.png").write_bytes(png(9_999, 9_999))
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "huge.png"), str(tmp_path / "large.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["too_large", "MemoryError"], done.stderr


def test_pillows_own_guard_says_nothing_about_our_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    data = encoded(Image.new("RGB", (20, 10)), "PNG")
    skipped = reason(data)
    assert skipped.reason is Reason.TOO_LARGE
    assert skipped.depends != too_large_dependence(LIMITS)
    with warnings.catch_warnings():
        own_process()
        assert isinstance(decode(data, LIMITS, 64), DecodedImage)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files_are_pictures_or_reasons_never_exceptions(kind):
    tags = Image.Exif()
    tags[0x0112] = 6
    whole = encoded(portrait(), kind, **({} if kind in ("GIF", "BMP") else {"exif": tags}))
    outcomes = set()
    for seed in range(300):
        data, dice = bytearray(whole), random.Random(seed)
        for _ in range(dice.randint(1, 5)):
            data[dice.randrange(min(len(data), 120 if seed % 3 else len(data)))] = dice.randrange(256)
        if seed % 5 == 0:
            data = data[: dice.randrange(len(data))]
        result = decode(bytes(data), Limits(pixels=1_000_000), 64)
        outcomes.add(type(result))
        if isinstance(result, Skipped):
            assert result.reason in (Reason.UNDECODABLE, Reason.TOO_LARGE)
            assert len(result.message) < 200
            assert "0x" not in result.message
        else:
            assert result.pixels.shape[2] == 3
            assert max(result.pixels.shape[:2]) <= 64
    assert outcomes == {DecodedImage, Skipped}


@pytest.mark.filterwarnings("ignore")
def test_twenty_thousand_bad_images_are_pixels_or_a_reason():
    outcomes = {DecodedImage: 0, Skipped: 0}
    for name, data in bad_images(20_000):
        result = decode(data, Limits(pixels=1_000_000), 4096)
        outcomes[type(result)] += 1
        if isinstance(result, Skipped):
            assert result.reason in (Reason.UNDECODABLE, Reason.TOO_LARGE), name
            assert 0 < len(result.message) < 200, name
        else:
            assert result.pixels.ndim == 3, name
    assert min(outcomes.values()) > 2000
