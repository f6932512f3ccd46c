"""Detection alone: `python benchmarks/detect.py [ROOT] [--synthetic N] [--device D] [--beside CHECKOUT] [--record]`.

Every path that this machine has, with MTCNN and with RetinaFace, beside facenet-pytorch's MTCNN in batches of 64 and,
with `--beside`, another checkout of this project, on the same decoded pictures, two turns each: images/s, how well
the boxes of the chosen face agree (RetinaFace draws other boxes), and how often only one of the two finds a face.
Slow paths take a minute a turn with the 1,024 pictures that are taken at most; `--most` and `--turns` say otherwise.
"""

import time
from contextlib import suppress
from pathlib import Path

import click
import faces
import numpy as np
import torch
from facenet_pytorch import MTCNN
from path_rate import Way, measured
from PIL import Image
from results import publish, table

from batchverify.faces.detection import Detections, FaceDetector, choose_face
from batchverify.runtime.devices import available_cpus, resolve_device, resolve_runtime

SMALLEST = 20
PEER_BATCH = 64
TURNS = 2
MOST_PICTURES = 1024
SIZES = (24, 32, 48, 64, 80, 128)


def ways(device: str, beside: Path | None) -> list[Way]:
    """Every way that a device has of finding faces of 20 pixels and more, and the default settings.

    MTCNN is not named: other checkouts may know no other detector.
    """
    same = {"device": device, "min_face": SMALLEST}
    runtimes = {"openvino": "OpenVINO", "torch": "torch"} if device == "cpu" else {"torch": "torch"}
    found = [
        Way(
            f"{label}, {name}",
            {**same, "runtime": runtime} | ({"detector": label} if label != "mtcnn" else {}),
        )
        for label in ("mtcnn", "retinaface")
        for runtime, name in runtimes.items()
    ]
    found.append(Way("default settings", {"device": device}))
    return found + ([Way(f"{beside.name}, another checkout", same, beside)] if beside else [])


def peer(pictures: list[np.ndarray], device: str) -> tuple[float, list[Detections]]:
    """The same of facenet-pytorch's MTCNN; a batch that it cannot do for want of a face goes one by one."""
    mtcnn = MTCNN(keep_all=True, min_face_size=SMALLEST, device=device)
    with suppress(ValueError):
        mtcnn.detect(pictures[:PEER_BATCH])
    started, found = time.perf_counter(), []
    for start in range(0, len(pictures), PEER_BATCH):
        batch = pictures[start : start + PEER_BATCH]
        try:
            results = list(zip(*mtcnn.detect(batch), strict=True))
        except ValueError:
            results = [mtcnn.detect(picture) for picture in batch]
        found += [_detections(boxes, scores) for boxes, scores in results]
    return len(pictures) / (time.perf_counter() - started), found


def _detections(boxes: np.ndarray | None, scores: np.ndarray) -> Detections:
    if boxes is None:
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    return Detections(np.asarray(boxes, np.float32), np.asarray(scores, np.float32))


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = np.prod(np.maximum(high - low, 0))
    areas = [np.prod(box[2:] - box[:2]) for box in (first, second)]
    return float(shared / (sum(areas) - shared))


def agreement(pictures: list[np.ndarray], mine: list[Detections], theirs: list[Detections]) -> list[str]:
    """Median and lowest overlap of the chosen faces, faces found, pictures where one alone finds a face."""
    overlaps = []
    alone = 0
    for picture, a, b in zip(pictures, mine, theirs, strict=True):
        if len(a) and len(b):
            boxes = [each.boxes[choose_face(each, *picture.shape[:2])] for each in (a, b)]
            overlaps.append(overlap(*boxes))
        else:
            alone += bool(len(a)) != bool(len(b))
    found = sum(bool(len(each)) for each in mine) / len(mine)
    return [
        f"{np.median(overlaps):.4f} ({np.min(overlaps):.3f})",
        f"{found:.2%}",
        f"{alone} ({alone / len(pictures):.2%})",
    ]


def recall(faces_of: list[np.ndarray], size: int, smallest: int | None, device: str) -> tuple[int, int]:
    """(found, all): faces of `size` pixels pasted into pictures of 2,048 x 1,536, twelve each."""
    runtime = resolve_runtime("auto", device)
    detector, native = FaceDetector.on(device, runtime, min_face=smallest), FaceDetector.on(device, runtime)
    found = total = 0
    for start in range(0, len(faces_of) - 11, 12):
        canvas = np.full((1536, 2048, 3), 127, np.uint8)
        wanted = []
        for place, picture in enumerate(faces_of[start : start + 12]):
            faces_here = native([picture])[0]
            if not len(faces_here):
                continue
            box = faces_here.boxes[choose_face(faces_here, *picture.shape[:2])]
            share = min(size / float((box[2:] - box[:2]).min()), 1.9)
            side = [round(length * share) for length in picture.shape[1::-1]]
            left, top = place % 4 * 512 + 10, place // 4 * 512 + 10
            canvas[top : top + side[1], left : left + side[0]] = np.asarray(Image.fromarray(picture).resize(side))
            wanted.append(box * share + [left, top, left, top])
        boxes = detector([canvas])[0].boxes
        found += sum(any(overlap(box, each) > 0.5 for each in boxes) for box in wanted)
        total += len(wanted)
    return found, total


def recall_table(pictures: list[np.ndarray], device: str) -> str:
    """What the default smallest face costs: the share of pasted faces found, by their size."""
    sample = pictures[:: max(1, len(pictures) // 48)][:48]
    rows = []
    for name, smallest in (("default (a 24th of the shorter side: 64)", None), ("--min-face 20", 20)):
        started = time.perf_counter()
        shares = [recall(sample, size, smallest, device) for size in SIZES]
        seconds = time.perf_counter() - started
        rows.append([name, *(f"{found / max(total, 1):.0%}" for found, total in shares), f"{seconds:.1f}"])
    return table(["faces in pictures of 2,048 x 1,536, by size", *(f"{size} px" for size in SIZES), "seconds"], rows)


@click.option("--most", type=click.IntRange(1), default=MOST_PICTURES, show_default=True)
@click.option("--turns", type=click.IntRange(1), default=TURNS, show_default=True)
@faces.image_options
def main(
    root: Path | None,
    synthetic: int | None,
    device: str,
    beside: Path | None,
    record: bool,
    most: int,
    turns: int,
) -> None:
    """Print the table."""
    pictures = faces.pictures(root, synthetic)[:most]
    device = resolve_device(device)
    torch.set_num_threads(available_cpus())
    best: dict[str, tuple[float, list[Detections]]] = {}
    name_of_peer = f"facenet-pytorch MTCNN, smallest face {SMALLEST}, batches of {PEER_BATCH}"
    for _ in range(turns):
        for way in ways(device, beside):
            found = measured("detect", pictures, way)
            boxes = [Detections(*each) for each in found.found]
            best[way.name] = max(best.get(way.name, (0.0, [])), (found.rate, boxes), key=lambda each: each[0])
        speed, theirs = peer(pictures, device)
        best[name_of_peer] = max(best.get(name_of_peer, (0.0, [])), (speed, theirs), key=lambda each: each[0])
    slowest, theirs = best[name_of_peer]
    rows = []
    for name, (speed, boxes) in best.items():
        row = [name, f"{speed:.1f}", f"{speed / slowest:.2f}"]
        rows.append(row + agreement(pictures, boxes, theirs))
    header = [f"detection alone, {len(pictures):,} pictures", "images/s", "of facenet-pytorch"]
    header += ["median IoU (lowest)", "with a face", "face found by one alone"]
    command = faces.command_line("detect.py", root, synthetic, device, beside)
    command += f" --most {most}" * (most != MOST_PICTURES) + f" --turns {turns}" * (turns != TURNS)
    body = f"{table(header, rows)}\n\n{recall_table(pictures, device)}"
    publish("Detect only", command, body, record=record)


if __name__ == "__main__":
    main()
