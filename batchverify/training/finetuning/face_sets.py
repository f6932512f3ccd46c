"""The sets of a fine-tuning: a manifest's labelled pairs over its face crops, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from batchverify.embedding.embedder import Embedder
from batchverify.errors import NothingScoredError, UsageError
from batchverify.manifest.manifest import Block
from batchverify.scoring.job import Job
from batchverify.training.finetuning.face_crops import FaceCrops, Report
from batchverify.training.finetuning.sets import LabelledImages
from batchverify.training.pairs import SHOWN, LeftOut, labels_of, persons_of, require_both_labels, shared_people


@dataclass(frozen=True)
class FaceSet:
    """A manifest's faces and pairs. left_out: rows with an image that shows no usable face."""

    name: str
    job: Job
    crops: FaceCrops
    pairs: LabelledImages
    left_out: tuple[LeftOut, ...]

    @classmethod
    def collect(
        cls, name: str, job: Job, embedder: Embedder, folder: Path, progress: Report = lambda *_: None
    ) -> FaceSet:
        """Cut the faces of a manifest's images into `folder`, where an earlier run may have left some of them.

        progress: is told of images. Raises `UsageError` if no pair of each label is left.
        """
        crops = FaceCrops.collect(job.scan.images, embedder, job.options.limits, job.manifest.fence, folder, progress)
        has_face = np.array([image not in crops.failed for image in range(len(crops))], bool)
        parts: list[tuple[np.ndarray, ...]] = []
        left_out: list[LeftOut] = []
        names: dict[int, str] = {}
        for block in job.manifest.blocks(job.scan):
            usable = has_face[block.a] & has_face[block.b]
            labels = labels_of(job.manifest, job.scan, block)
            parts.append((block.a[usable], block.b[usable], labels[usable]))
            left_out += _left_out(job, crops, block, usable)
            names.update(persons_of(block))
        a, b, all_labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        require_both_labels(name, all_labels)
        pairs = LabelledImages(a.astype(np.int32), b.astype(np.int32), all_labels, _people(names, len(crops)), name)
        return cls(name, job, crops, pairs, tuple(left_out))

    def check_failed(self, most: float) -> None:
        """Raise `NothingScoredError` if a larger share of the rows than `most` was left out."""
        failed, total = len(self.left_out), len(self.left_out) + len(self.pairs)
        if failed / total > most:
            raise NothingScoredError(
                f"{self.name} pairs: {failed:,} of {total:,} have an image without a usable face, more than "
                f"--max-failed {most:g} allows"
            )


def check_people_apart(people: Mapping[str, set[str]]) -> None:
    """Raise `UsageError` if two sets name the same person. people: names by set."""
    for leak in shared_people(people):
        raise UsageError(f"{leak}: fine-tuning is measured on people that it has not learned from")


def check_images_apart(sets: Sequence[FaceSet]) -> None:
    """Raise `UsageError` if two sets hold the same image, byte for byte."""
    for first, second in combinations(sets, 2):
        others = {key for key in second.crops.keys if key}
        shared = [image for image, key in enumerate(first.crops.keys) if key in others]
        if shared:
            paths = ", ".join(str(first.job.scan.images[image]) for image in shared[:SHOWN])
            more = ", …" if len(shared) > SHOWN else ""
            raise UsageError(
                f"{first.name} and {second.name} share {len(shared):,} identical images ({paths}{more}): fine-tuning "
                "is measured on images that it has not learned from"
            )


def _left_out(job: Job, crops: FaceCrops, block: Block, usable: np.ndarray) -> list[LeftOut]:
    rows = []
    for row in np.flatnonzero(~usable).tolist():
        skipped = [crops.failed.get(int(side[row])) for side in (block.a, block.b)]
        reasons = [None if each is None else each.reason.value for each in skipped]
        rows.append(LeftOut(*job.manifest.locate(job.scan, block.first + row), *reasons))
    return rows


def _people(names: Mapping[int, str], images: int) -> np.ndarray:
    """(M,) int32: a number for each person, -1 for images of nobody named."""
    numbers = {name: number for number, name in enumerate(sorted(set(names.values())))}
    people = np.full(images, -1, np.int32)
    for image, name in names.items():
        people[image] = numbers[name]
    return people
