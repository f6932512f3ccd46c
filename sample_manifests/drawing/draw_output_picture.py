"""Draw docs/output.png, the image of the README: some scored pairs of the samples with their faces."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import batchverify

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
SAMPLES = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("image_a", 20),
    ("image_b", 150),
    ("probability", 290),
    ("label", 430),
    ("similarity", 520),
    ("status", 650),
)
ROW, FACE, TOP, WIDTH = 88, 76, 56, 960
INK, FAINT, PAPER = (32, 36, 44), (120, 126, 138), (255, 255, 255)
COLOURS = {0: (30, 130, 76), 1: (186, 74, 0)}


def face(path: Path) -> Image.Image:
    """A square thumbnail; grey for a file that is no image."""
    try:
        return Image.open(path).convert("RGB").resize((FACE, FACE), Image.Resampling.LANCZOS)
    except OSError:
        return Image.new("RGB", (FACE, FACE), (226, 228, 232))


def draw_row(canvas: Image.Image, row: dict, top: int, font: Font) -> None:
    """One pair: two faces, then the columns of the output."""
    pen = ImageDraw.Draw(canvas)
    middle = top + FACE // 2 - 10
    for side, left in (("image_a", 20), ("image_b", 150)):
        canvas.paste(face(SAMPLES / row[side]), (left, top))
    if row["status"] == "ok":
        verdict = f"{row['label']:.0f}  {'different' if row['label'] else 'same'}"
        pen.text((290, middle), f"{row['probability']:.6f}", INK, font)
        pen.text((430, middle), verdict.split()[0], COLOURS[int(row["label"])], font)
        pen.text((520, middle), f"{row['similarity']:.4f}", INK, font)
        pen.text((650, middle), f"ok    ({verdict.split()[1]})", COLOURS[int(row["label"])], font)
    else:
        for left in (290, 430, 520):
            pen.text((left, middle), "null", FAINT, font)
        sides = " and ".join(side for side in ("a", "b") if row[f"error_{side}"])
        pen.text((650, middle), f"{row['status']}    (error_{sides})", (176, 32, 48), font)


def main() -> None:
    """Score the samples, pick a few rows, draw them."""
    good = batchverify.score(SAMPLES / "faces.csv", quiet=True).to_arrow().to_pylist()
    broken = batchverify.score(SAMPLES / "broken.csv", quiet=True).to_arrow().to_pylist()
    failed = {row["error_b"]: row for row in broken if row["status"] == row["error_b"]}
    rows = [*good[:6], failed["no_face"], failed["undecodable"]]
    canvas = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + 12), PAPER)
    font = ImageFont.load_default(18)
    for name, left in COLUMNS:
        ImageDraw.Draw(canvas).text((left, 18), name, FAINT, font)
    for number, row in enumerate(rows):
        draw_row(canvas, row, TOP + ROW * number, font)
    canvas.save(SAMPLES.parent / "docs" / "output.png", optimize=True)


if __name__ == "__main__":
    main()
