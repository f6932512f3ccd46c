"""Decoding: what is no image, limits of size, memory and time, odd files, and damaged files by the hundred."""

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from bad_images import (
    ANIMATED_AVIF,
    ARITHMETIC,
    ARITHMETIC_PROGRESSIVE,
    bad_images,
    chunk,
    encoded,
    good_images,
    with_chunk,
    ycck,
)
from PIL import Image, ImageFile, ImageOps, features

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
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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


def pixels(data: bytes, long_side: int = 4096) -> np.ndarray:
    result = decode(data, LIMITS, long_side)
    assert isinstance(result, DecodedImage), result
    return result.pixels.astype(int)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", good_images())
def test_a_file_that_is_cut_anywhere_is_the_whole_image_or_undecodable(name):
    whole = good_images()[name]
    wanted = pixels(whole)
    # Heads and ends byte by byte, of what lies between every fifth.
    for end in {*range(min(len(whole), 260)), *range(0, len(whole), 5), *range(len(whole) - 20, len(whole))}:
        result = decode(whole[:end], LIMITS, 4096)
        if isinstance(result, Skipped):
            assert result.reason is Reason.UNDECODABLE, (end, result)
        else:
            assert np.array_equal(result.pixels, wanted), f"another image if cut after {end} of {len(whole)}"


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"quality_layers": [40, 1], "quality_mode": "rates"}])
def test_a_jpeg_2000_without_one_of_its_tiles_is_undecodable(options):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG2000", tile_size=(16, 16), **options)
    starts = [at for at in range(len(data)) if data.startswith(b"\xff\x90\x00\x0a", at)]
    assert len(starts) == 9
    assert pixels(data).shape == (40, 40, 3)
    for first, last in zip(starts, [*starts[1:], len(data) - 2], strict=True):
        skipped = reason(data[:first] + data[last:])
        assert skipped.reason is Reason.UNDECODABLE
    assert "fewer tiles" in reason(data[: starts[4]] + data[-2:]).message
    # What a box before it holds is no codestream.
    if not options:
        decoy = encoded(Image.new("RGB", (8, 8)), "JPEG2000", no_jp2=True)
        box = struct.pack(">I4s", len(decoy) + 8, b"uuid") + decoy
        assert np.array_equal(pixels(data[:32] + box + data[32:]), pixels(data))
        assert "fewer tiles" in reason(data[:32] + box + data[32 : starts[4]] + data[-2:]).message


@pytest.mark.parametrize("name", good_images())
@pytest.mark.parametrize("other", ["png", "gif", "jpeg", "zip", "html"])
def test_what_is_appended_changes_no_image(name, other):
    data, images = good_images()[name], good_images()
    more = images.get(other) or {"zip": b"PK\5\6" + bytes(18), "html": b"<script>alert(1)</script>"}[other]
    result = decode(data + more, LIMITS, 4096)
    assert isinstance(result, DecodedImage), result
    assert np.array_equal(result.pixels, pixels(data))


@pytest.mark.parametrize("front", [b"%PDF-1.4\n", b"<html>", b"PK\3\4", b"\0"])
def test_an_image_inside_of_another_file_is_not_looked_for(front):
    assert reason(front + good_images()["jpeg"]).reason is Reason.UNDECODABLE


def test_variants_of_jpeg_have_their_colours():
    image = portrait()
    image.paste((200, 40, 90), (10, 10, 60, 60))
    wanted = np.asarray(image).astype(int)
    inks = ImageOps.invert(image)
    for data in (
        encoded(image, "JPEG", quality=95, subsampling=0),
        encoded(image, "JPEG", quality=95, subsampling=0, progressive=True),
        encoded(image, "JPEG", quality=95, subsampling=0, restart_marker_rows=1),
        encoded(image, "JPEG", quality=95, keep_rgb=True),
        ycck(image),
        encoded(Image.merge("CMYK", [*inks.split(), Image.new("L", image.size)]), "JPEG", quality=95),
    ):
        assert np.abs(pixels(data) - wanted).mean() < 3
    gradient = np.asarray(Image.linear_gradient("L").resize((16, 16))).astype(int)[..., None]
    assert np.array_equal(pixels(ARITHMETIC), pixels(ARITHMETIC_PROGRESSIVE))
    assert np.abs(pixels(ARITHMETIC) - gradient).mean() < 6


def test_jpegs_that_cannot_be_read_faithfully_are_undecodable():
    whole = encoded(portrait(), "JPEG")
    frame = whole.index(b"\xff\xc0")
    twelve_bits = whole[: frame + 4] + b"\x0c" + whole[frame + 5 :]
    lossless = whole[:frame] + b"\xff\xc3" + whole[frame + 2 :]
    for data in (twelve_bits, lossless):
        assert reason(data).reason is Reason.UNDECODABLE


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("cut", [2, 100, 400])
@pytest.mark.parametrize("more", [b"", bytes(2000), b"\0\1" * 500, good_images()["jpeg"]], ids=len)
def test_a_jpeg_without_its_end_is_undecodable(options, cut, more):
    """As downloads leave them that reserve a file's size first: the decoder takes zeros for pixels."""
    whole = encoded(portrait(), "JPEG", quality=95, **options)
    assert pixels(whole + more).shape == (80, 120, 3)
    assert reason(whole[:-cut] + more).reason is Reason.UNDECODABLE


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x08mdat"


def test_heic_is_undecodable_with_or_without_a_decoder():
    assert "JPEG, PNG" in reason(HEIC).message

    class Heif(ImageFile.ImageFile):
        """What a plug-in such as pillow-heif registers."""

    Image.register_open("HEIF", Heif, lambda prefix: prefix[4:8] == b"ftyp")
    try:
        assert reason(HEIC).reason is Reason.UNDECODABLE
    finally:
        Image.OPEN.pop("HEIF")
        Image.ID.remove("HEIF")


def test_avif_without_a_decoder_is_tried_again_with_one(monkeypatch):
    data, with_it, check = good_images()["avif"], decoder_set(), features.check
    assert pixels(data).shape == (20, 24, 3)
    with monkeypatch.context() as patch:
        patch.setattr(features, "check", lambda name: name != "avif" and check(name))
        patch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
        decoder_set.cache_clear()
        skipped = reason(data)
    decoder_set.cache_clear()
    assert skipped.reason is Reason.UNDECODABLE
    assert skipped.depends == f"{with_it}, without avif" != decoder_set()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_line_of_pixels_is_an_image(kind, size):
    data = encoded(Image.new("RGB", size, (200, 10, 10)), kind)
    got = pixels(data, 640)
    assert sorted(got.shape) == [1, 3, 640]
    assert np.abs(got - (200, 10, 10)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_comes_back_upright(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    image = Image.new("RGB", (24, 16), (250, 0, 0))
    image.paste((0, 250, 0), (0, 0, 16, 4))
    stored = encoded(image, "PNG", exif=tags)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))).astype(int)
    got = pixels(encoded(image, "AVIF", exif=tags, quality=95))
    assert got.shape == upright.shape
    assert np.abs(got - upright).mean() < 8


def test_animated_avif_is_its_first_frame():
    assert np.abs(pixels(ANIMATED_AVIF) - np.full((16, 24, 3), (250, 0, 0))).max() <= 3


def resized_jpeg(data: bytes, side: int) -> bytes:
    """A JPEG that says that it is larger."""
    place = next(data.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data) + 5
    return data[:place] + struct.pack(">HH", side, side) + data[place + 4 :]


def test_forms_that_are_slow_to_decode_have_smaller_limits():
    progressive = encoded(portrait(), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    many = progressive[:last] + progressive[last:-2] * 60 + b"\xff\xd9"
    codestream = encoded(portrait(), "JPEG2000", no_jp2=True)
    head = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 2000, 0, 0, 1078, 40, 5000, 4000, 1, 8, 1, 0, 0, 0, 256, 0)
    slow = {
        "a largest value that is not 255": b"P5\n2100 2000\n100\n" + bytes(2100 * 2000),
        "plain text": b"P2\n2100 2000\n255\n" + b"0 " * 100,
        "run lengths": head + bytes(1024) + b"\0\1",
        "run lengths without pixels": head.replace(struct.pack("<ii", 5000, 4000), struct.pack("<ii", 50, 40))
        + bytes(1024)
        + b"\0\2\0\0" * 8_000_000,
        "many scans of a large JPEG": resized_jpeg(many, 9_400),
        "a large JPEG 2000": codestream[:8] + struct.pack(">II", 8_100, 8_000) + codestream[16:],
    }
    for what, data in slow.items():
        skipped = reason(data)
        assert skipped.reason is Reason.TOO_LARGE, (what, skipped)
        assert "slow to decode" in skipped.message
    assert pixels(many).shape == (80, 120, 3)
    assert pixels(b"P5\n20 10\n100\n" + bytes(200)).shape == (10, 20, 3)


@pytest.mark.parametrize("fill", [b"\xff", b"\0"])
def test_bytes_that_a_header_is_filled_up_with(fill):
    """Pillow reads them one by one: 60 MB took a minute and a half."""
    jpeg = encoded(portrait(), "JPEG")
    some, many = (jpeg[:20] + fill * (count // len(fill)) + jpeg[20:] for count in (60_000, 70_000))
    assert np.array_equal(pixels(some), pixels(jpeg))
    assert reason(many).reason is Reason.TOO_LARGE
    assert reason(many[:70_000]).reason is Reason.TOO_LARGE


@pytest.mark.parametrize("kind", [b"P4", b"P5", b"P6"])
@pytest.mark.parametrize("fill", [b" ", b"#", b"#\n"])
def test_a_header_of_a_pnm_ends(kind, fill):
    head, size = {b"P4": b"2000 400\n", b"P5": b"400 400 255\n", b"P6": b"200 200 255\n"}[kind], 200_000
    bare = kind + b"\n" + head + fill * (size // len(fill))
    assert pixels(bare).shape[2] == 3
    assert np.array_equal(pixels(kind + b"\n" + fill * 20_000 + b"\n" + head + bare[len(head) + 3 :]), pixels(bare))
    assert reason(kind + b"\n" + fill * size + b"\n" + head + bytes(size)).reason is Reason.TOO_LARGE


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "I;16", "F"])
def test_tall_images_are_converted_row_by_row_alike(mode):
    """More rows than are converted at once: the same pixels as in one piece."""
    rng = np.random.default_rng(0)
    shape = {"LA": (700, 5, 2), "RGBA": (700, 5, 4)}.get(mode, (700, 5))
    samples = rng.integers(0, 256, shape, np.uint8)
    if mode in ("LA", "RGBA"):
        alpha = samples[..., -1:].astype(float) / 255
        wanted = np.broadcast_to(samples[..., :-1] * alpha + 255 * (1 - alpha), (700, 5, 3))
        assert np.abs(pixels(encoded(Image.fromarray(samples), "PNG")) - wanted).max() <= 1
    elif mode in ("L", "P"):
        image = Image.fromarray(samples)
        grey = np.where(samples == 7, 255, samples)
        if mode == "P":
            image = image.convert("P", palette=Image.Palette.WEB)
            image.putpalette(bytes(value for grey_value in range(256) for value in [grey_value] * 3))
            image.frombytes(samples.tobytes())
        got = pixels(encoded(image, "PNG", transparency=7))
        assert np.array_equal(got, np.repeat(grey[..., None], 3, 2))
    else:
        deep = samples.astype(np.uint16) * 257 if mode == "I;16" else samples.astype(np.float32) / 255
        got = pixels(encoded(Image.fromarray(deep), "TIFF"))
        assert np.array_equal(got, np.repeat(samples[..., None], 3, 2))


@pytest.mark.parametrize("name", ["IHDR", "IDAT"])
@pytest.mark.parametrize("kind", [b"abCd", b"gAMA", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"iCCP", b"zTXt"])
def test_odd_chunks_of_a_png_change_nothing(name, kind):
    whole = good_images()["png"]
    for body in (b"", b"\0", bytes(300), b"\xff" * 70_000):
        if (kind, name) == (b"tRNS", "IHDR") and len(body) > 1:
            continue  # a colour that is transparent
        got = decode(with_chunk(whole, chunk(kind, body), last=name == "IDAT"), LIMITS, 4096)
        assert isinstance(got, DecodedImage | Skipped)
        if isinstance(got, DecodedImage) and kind != b"eXIf":
            assert np.array_equal(got.pixels, pixels(whole)), body[:9]
