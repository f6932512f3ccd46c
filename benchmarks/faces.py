"""Pictures for the benchmarks: LFW's View 1, or JPEGs made on the spot from the sample faces."""

import csv
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageEnhance
from results import BESIDE

from batchverify.manifest.prepare import prepare_lfw

SAMPLES = Path(__file__).parent.parent / "sample_manifests" / "faces"
SIDE = 250


def image_options(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that all benchmarks on pictures take: ROOT, --synthetic, --device, --beside, --record."""
    for decorate in (
        click.option(
            "--beside",
            type=click.Path(exists=True, path_type=Path),
            help="Another checkout of this project, measured in the same run.",
        ),
        click.option("--record", is_flag=True, help="Put the table into RESULTS.md."),
        click.option("--device", default="auto", show_default=True),
        click.option("--synthetic", type=int, help="Make so many JPEGs instead of reading LFW's."),
        click.argument("root", type=click.Path(path_type=Path), required=False),
    ):
        command = decorate(command)
    return click.command()(command)


def command_line(script: str, root: Path | None, synthetic: int | None, device: str, beside: Path | None) -> str:
    """How a benchmark was called, for RESULTS.md."""
    where = f" --device {device}" if device != "auto" else ""
    where += BESIDE if beside else ""
    return f"python benchmarks/{script} {'ROOT' if root else f'--synthetic {synthetic}'}{where}"


def manifest(folder: Path, root: Path | None, synthetic: int | None) -> Path:
    """A manifest in `folder` over all images of LFW View 1 below `root`, or over `synthetic` made ones."""
    target = folder / "all.csv"
    if root is None and not synthetic:
        sys.exit("give LFW's folder, or --synthetic N")
    if root is None:
        pairs = _synthetic_pairs(folder, synthetic or 0)
    else:
        prepare_lfw(root, folder)
        pairs = [row for name in ("train", "dev", "test") for row in _pairs(folder / f"{name}.csv")]
    with target.open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([("image_a", "image_b"), *pairs])
    return target


def images(path: Path) -> list[Path]:
    """The distinct images of a manifest, in order."""
    found = {name: None for row in _pairs(path) for name in row}
    return [path.parent / name for name in found]


def pictures(root: Path | None, synthetic: int | None) -> list[np.ndarray]:
    """The decoded images of `manifest`: (H, W, 3) uint8 RGB each."""
    with tempfile.TemporaryDirectory() as folder:
        paths = images(manifest(Path(folder), root, synthetic))
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def cut(path: Path, count: int) -> Path:
    """A manifest of `count` distinct images of another one's, each in one pair."""
    names = images(path)[:count]
    target = path.with_name(f"{count}.csv")
    with target.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(("image_a", "image_b"))
        writer.writerows(zip(names[::2], names[1::2], strict=False))
    return target


def _pairs(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf8") as file:
        return [(row["image_a"], row["image_b"]) for row in csv.DictReader(file)]


def _synthetic_pairs(folder: Path, count: int) -> list[tuple[str, str]]:
    """JPEGs of 250 pixels, no two alike: sample faces moved, brightened and with noise."""
    rng = np.random.default_rng(0)
    faces = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    names = []
    for number in range(count):
        face = faces[number % len(faces)].resize((SIDE, SIDE))
        face = face.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, fillcolor="grey")
        face = ImageEnhance.Brightness(face).enhance(rng.uniform(0.8, 1.2))
        noise = rng.normal(0, 3, (SIDE, SIDE, 3))
        pixels = np.clip(np.asarray(face) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        names.append(f"{number}.jpg")
    return [(name, names[(place + 1) % count]) for place, name in enumerate(names)]
