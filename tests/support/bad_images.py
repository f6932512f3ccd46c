"""Bad and odd images, thousands of them, the same ones in every run."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, ImageOps

SIZE = (24, 20)
# A grey gradient of 16 x 16 by the arithmetic coder, which Pillow reads but does not write (`jpegtran -arithmetic`),
# in one scan and progressive.
ARITHMETIC, ARITHMETIC_PROGRESSIVE = (
    base64.b85decode(text)
    for text in (
        "|JeWF01!$>Nk#wx0RR9200961|JwjV01yid4h#wq4h;?x5fBp?C>j_R78o%jB^@X_Gd(;xGdMRuNL)@pL{~*OI8bd-S6^ahXlFi6ad~"
        "iLcwA*?WB<tj3kU!Z01yEI5di<p00saM5C#9*00;pA002J#{{H|T^PrUhBe(NJ!2j6",
        "|JeWF01!$>Nk#wx0RR9200961|JwjV01yid4h#wq4h;?x5fBp?C>j_R78o%jB^@X_Gd(;xGdMRuNL)@pL{~*OI8bd-S6^ahXlFi6ad~"
        "iLcwA*?WB<wk3kU!Z01yEI5di<p00aOK|Jncu0RaF200I6EnE%WG1P}%P+5iXv0RRC70-E$D5dX{o1P}%P+5iXv0RRR+0>J;w00a;P|"
        "Jncu0RaF3KOszGynz4O00;pA0000GVE@bj1P}%P+5iXv0RRC%5KJII|Je",
    )
)

# Two frames, red and blue, 24 x 16: Pillow's encoder of such files sometimes ends the process.
ANIMATED_AVIF = zlib.decompress(
    base64.b85decode(
        "c-oCqF>4e-6n?W8<Omm8<B36Xdg6f=DQ>T_OguRP5-dWnFwMHN>yFvU3_Ig;h7^jJGFJAf{S7Hns90J`dQq^m5kV5)?9Rq@O`;Em"
        "_ultr=6&<+TL74g^b_f4OaU7D$i!Sl9#i5bXOYL5A1y6-x3K(`huVk2uEsP;Z48nH8ftb{GR^ad;JVBb5t!t*$w`4WKB2#k>jq=%"
        "(b3*Zn1qha{H*T{MI!QEkC;p)`a4Vp0)3k)8QOj`xLmU&8#4nmn$0G<mY;dUXV5ax`9LJ;dXS9q<|#Py6rqbu^72hcY=St?Cjgvx"
        "T!;*zG0$R3Z2fb8f9tnzd^xmcc#`VdNllAdJ`blF?si5x_17?t^;+Ja{N2C6jyS;SJ&)y3YKCJFQf)?{7bZ&Ee&q@0&pXI#PMMKx"
        "j?<I1DbKFF`LA&yE4&zicE)2`quZlJZI-5CRH4#(oF?5OCKr@`kYM~uX+<l0UYG$oK@uZ?3ybI%%N>&ocbB?DfejxX|8Zt=ssAxl"
        "ZV;&ag`4(}(z&`N3CH?bBpX!ldTpc9*s=dg&xoXSKL1epj}TL;cGohezMh83DRaK_bN`3yeu(D>Z5MVBFeC7G^zquxaQEBl>NE_x"
        "{l*^B9~H$e?4DbG`F(J|bMMOb!TS#7d%pnno2Bs"
    )
)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    """A PNG chunk; wrong: added to its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def with_chunk(png: bytes, extra: bytes, *, last: bool = False) -> bytes:
    """A PNG with another chunk after its header, or before its end."""
    place = len(png) - 12 if last else 33
    return png[:place] + extra + png[place:]


def ycck(image: Image.Image) -> bytes:
    """An RGB image as a JPEG of luma, two colours and black, as Photoshop writes those of four inks."""
    inks = Image.merge("YCbCr", ImageOps.invert(image).convert("YCbCr").split()).split()
    # Pillow writes the complements of inks. The marker then says that the first three are YCbCr.
    planes = [ImageOps.invert(plane) for plane in inks]
    data = encoded(Image.merge("CMYK", [*planes, Image.new("L", image.size)]), "JPEG", quality=95, subsampling=0)
    place = data.index(b"Adobe") + 11
    return data[:place] + b"\2" + data[place + 1 :]


def good_images() -> dict[str, bytes]:
    """One small image of every format and of the variants of JPEG, by name."""
    image = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    tags = Image.Exif()
    tags[0x0112] = 6
    return {
        "jpeg": encoded(image, "JPEG"),
        "exif": encoded(image, "JPEG", exif=tags),
        "progressive": encoded(image, "JPEG", progressive=True),
        "grey": encoded(image.convert("L"), "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "ycck": ycck(image),
        "arithmetic": ARITHMETIC,
        "mpo": encoded(image, "MPO", **frames),
        "png": encoded(image, "PNG", exif=tags),
        "palette": encoded(image.quantize(8), "PNG", transparency=2),
        "apng": encoded(image, "PNG", **frames),
        "gif": encoded(image, "GIF", **frames),
        "webp": encoded(image, "WEBP", **frames),
        "lossless": encoded(image, "WEBP", lossless=True, exif=tags),
        "avif": encoded(image, "AVIF"),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF", exif=tags),
        "lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "ppm": encoded(image, "PPM"),
        "jpeg 2000": encoded(image, "JPEG2000"),
        "tiles": encoded(image, "JPEG2000", tile_size=(8, 8), no_jp2=True),
    }


def bad_images(tries: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`tries` damaged images: cut, with flipped bytes, polyglots, with bytes put in or left out."""
    whole = list(good_images().items())
    for number in range(tries):
        dice = random.Random(seed * tries + number)
        name, data = whole[number % len(whole)]
        yield f"{name} {seed * tries + number}", _damaged(data, dice)


def _damaged(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(min(len(data), 200) if dice.random() < 0.6 else len(data))
    few = dice.randbytes(dice.randint(1, 6))
    return (
        data[:place],
        data[:place] + few + data[place + len(few) :],
        data[:place] + few + data[place:],
        data[:place] + data[place + len(few) :],
        data[:place] + b"\xff" * len(few) + data[place + len(few) :],
        data + b"PK\x03\x04" + few,
        b"<html><body>" + data,
    )[dice.randrange(7)]
