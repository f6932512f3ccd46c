"""Labelled pairs: collected from manifests, checked, drawn, and searched for leaks between sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.manifest import TRUE_LABEL, Block, Manifest, Scan

# Images whose pairs give the thresholds at false accept rates. Their 224,115 pairs are twice as many as the lowest
# rate needs.
MOST_IMPOSTORS = 670
BLOCK = 4096
# Rows, people or images that a message lists.
SHOWN = 5
DIGEST_BYTES = 16


@dataclass(frozen=True)
class LeftOut:
    """A row that could not be embedded: file, row from 1, and the reason for each image or None."""

    file: str
    row: int
    error_a: str | None
    error_b: str | None

    def __str__(self) -> str:
        errors = {"image_a": self.error_a, "image_b": self.error_b}
        reasons = ", ".join(f"{column} {reason}" for column, reason in errors.items() if reason)
        return f"{self.file}: row {self.row}: {reasons}"


@dataclass(frozen=True)
class LabelledPairs:
    """N labelled pairs among M images.

    vectors: (M, D) float16 unit rows. a, b: (N,) int32 indices of images. labels: (N,) int8, 0 or 1. name: for
    messages. image_paths: by image. persons: by image, if the manifest names them. left_out: rows that could not be
    embedded. originals: number of leading pairs without augmented views; None for all. views: number of augmented
    views of all images that follow the images in `vectors`.
    """

    vectors: np.ndarray
    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray
    name: str = "pairs"
    image_paths: tuple[str, ...] = ()
    persons: dict[int, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    originals: int | None = None
    views: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def collect(cls, manifest: Manifest, scan: Scan, embeddings: EmbeddingTable, name: str) -> LabelledPairs:
        """Collect a manifest's pairs. Raises `ManifestError` if there are no labels or one is blank."""
        parts: list[tuple[np.ndarray, ...]] = []
        left_out: list[LeftOut] = []
        persons: dict[int, str] = {}
        for block in manifest.blocks(scan):
            labels = labels_of(manifest, scan, block)
            usable = embeddings.usable(block.a, block.b)
            left_out += _left_out(manifest, scan, embeddings, block, usable)
            parts.append((block.a[usable].astype(np.int32), block.b[usable].astype(np.int32), labels[usable]))
            persons.update(persons_of(block))
        a, b, all_labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        image_paths = tuple(map(str, scan.images))
        return cls(embeddings.vectors, a, b, all_labels, name, image_paths, persons, tuple(left_out))

    def check(self, fewest: int = 1) -> None:
        """Raise `UsageError` if a label is missing, vectors are not finite or there are fewer than `fewest` pairs."""
        require_both_labels(self.name, self.labels)
        if len(self) < fewest:
            raise UsageError(f"only {len(self)} {self.name} pairs; at least {fewest} are needed")
        bad = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if len(bad):
            first = f" (first: {self.image_paths[bad[0]]})" if self.image_paths else ""
            raise UsageError(
                f"the {self.name} pairs have {len(bad):,} embeddings that are not finite{first}: find them with "
                "`batchverify cache verify`"
            )

    def subset(self, rows: np.ndarray) -> LabelledPairs:
        """Some of the pairs, by mask or index, of the same images."""
        return replace(self, a=self.a[rows], b=self.b[rows], labels=self.labels[rows], originals=None)

    def with_views(self, views: Sequence[np.ndarray], seed: int) -> LabelledPairs:
        """The pairs, then each again per augmented view, with both images drawn from all views and the plain images.

        views: vectors of the same images, (M, D) float16 each. The plain image's replaces a zero row (no face).
        """
        tables = [self.vectors]
        tables += [np.where(view.any(axis=1, keepdims=True), view, self.vectors) for view in views]
        rng, count = np.random.default_rng(seed), len(self.vectors)
        offsets = rng.integers(0, len(tables), (2, len(views), len(self))).astype(np.int32) * count
        return replace(
            self,
            vectors=np.concatenate(tables),
            a=np.concatenate([self.a, (self.a + offsets[0]).ravel()]),
            b=np.concatenate([self.b, (self.b + offsets[1]).ravel()]),
            labels=np.tile(self.labels, 1 + len(views)),
            image_paths=self.image_paths * len(tables),
            persons={
                image + view * count: person for view in range(len(tables)) for image, person in self.persons.items()
            },
            originals=len(self),
            views=len(views),
        )

    def draw(self, most: int, seed: int) -> LabelledPairs:
        """A random draw of at most `most` pairs of each label."""
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(self.labels == label))[:most] for label in (0, 1)]
        return self.subset(np.sort(np.concatenate(rows)))

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Blocks of (a, b, labels) in order: (B, D) float32 twice, (B,) float32."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a, b, labels) of some pairs, by index."""
        a, b = (torch.from_numpy(self.vectors[side[rows]]).float() for side in (self.a, self.b))
        return a, b, torch.from_numpy(self.labels[rows]).float()

    def groups(self) -> np.ndarray:
        """(M,) int64: equal for images of one person. An image without a person and its views are one group."""
        numbers: dict[str, int] = {}
        images = len(self.vectors) // (1 + self.views)
        groups = np.arange(len(self.vectors), dtype=np.int64) % images + len(self.persons)
        for image, person in self.persons.items():
            groups[image] = numbers.setdefault(person, len(numbers))
        return groups

    def images(self) -> np.ndarray:
        """Indices of the images that occur in a pair, sorted."""
        return np.unique(np.concatenate([self.a, self.b]))

    def impostor_pairs(self) -> LabelledPairs:
        """The different pairs among `all_pairs`, or those among the labelled pairs if these are more."""
        pairs = self.all_pairs()
        possible, labelled = pairs.subset(pairs.labels == 1), self.subset(self.labels == 1)
        return possible if len(possible) >= len(labelled) else labelled

    def all_pairs(self) -> LabelledPairs:
        """All pairs of the images of named people, or the labelled pairs if nobody is named.

        From more than `MOST_IMPOSTORS` images a fixed draw is taken.
        """
        if not self.persons:
            return self
        # The row of an image that failed is zero.
        images = np.array(sorted(index for index in self.persons if self.vectors[index].any()), np.int32)
        if len(images) > MOST_IMPOSTORS:
            images = np.sort(np.random.default_rng(0).choice(images, MOST_IMPOSTORS, replace=False))
        groups = self.groups()[images]
        first, second = np.triu_indices(len(images), 1)
        labels = (groups[first] != groups[second]).astype(np.int8)
        return replace(self, a=images[first], b=images[second], labels=labels, originals=None)


def require_both_labels(name: str, labels: np.ndarray) -> None:
    """Raise `UsageError` unless (N,) labels are 0 and 1, and both occur. name: of their set of pairs."""
    same, different = int((labels == 0).sum()), int((labels == 1).sum())
    if min(same, different) < 1 or same + different != len(labels):
        raise UsageError(
            f"the {name} pairs need label 0 and label 1: "
            f"of {len(labels):,} pairs, {same:,} are same and {different:,} different"
        )


def count_labels(manifest: Manifest, scan: Scan) -> tuple[int, int]:
    """The numbers of (same, different) rows. Raises `ManifestError` if there are no labels or one is blank."""
    counts = np.zeros(2, np.int64)
    for block in manifest.blocks(scan):
        counts += np.bincount(labels_of(manifest, scan, block), minlength=2)
    same, different = counts.tolist()
    return same, different


def people_of(manifest: Manifest, scan: Scan) -> set[str]:
    """The names of all people in a manifest."""
    return {person for block in manifest.blocks(scan) for _, person in persons_of(block)}


def persons_of(block: Block) -> Iterator[tuple[int, str]]:
    """(image, person) of all images in a block whose person is named."""
    for column, images in (("person_a", block.a), ("person_b", block.b)):
        if column in block.carried.schema.names:
            people = zip(images.tolist(), block.carried.column(column).to_pylist(), strict=True)
            yield from ((image, _name(person)) for image, person in people if person not in (None, ""))


def _name(person: Any) -> str:
    """A person's name as text; 1 and 1.0, as pandas may write the same column, are one person."""
    return str(int(person)) if isinstance(person, float) and person.is_integer() else str(person)


def labels_of(manifest: Manifest, scan: Scan, block: Block) -> np.ndarray:
    """The labels (N,) int8 of a block. Raises `ManifestError` if there are none or one is blank."""
    if not manifest.has_label:
        raise ManifestError(f"{manifest.names[0]}: the manifest has no column 'label'; training needs one")
    cells = block.carried.column(block.carried.schema.get_field_index(TRUE_LABEL))
    if cells.null_count:
        row = int(np.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False))[0])
        file, number = manifest.locate(scan, block.first + row)
        raise ManifestError(f"{file}: row {number}: the label is blank; training needs 0 or 1 in every row")
    return cells.to_numpy()


def _left_out(
    manifest: Manifest, scan: Scan, embeddings: EmbeddingTable, block: Block, usable: np.ndarray
) -> list[LeftOut]:
    rows = np.flatnonzero(~usable)
    a, b = (embeddings.reasons(side[rows]).to_pylist() for side in (block.a, block.b))
    places = (manifest.locate(scan, block.first + int(row)) for row in rows)
    return [LeftOut(*place, *reasons) for place, *reasons in zip(places, a, b, strict=True)]


@dataclass(frozen=True)
class Leak:
    """What two sets share. people: names, sorted. images: paths of the same image in the first and second set."""

    first: str
    second: str
    people: tuple[str, ...]
    images: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        shared = []
        if self.people:
            shared.append(_count_and_list("person", "people", self.people))
        if self.images:
            shared.append(_count_and_list("identical image", "identical images", [a for a, _ in self.images]))
        return f"{self.first} and {self.second} share {' and '.join(shared)}"


def find_leaks(sets: Sequence[LabelledPairs]) -> list[Leak]:
    """The leaks between any two sets. Images are the same if their embeddings have the same bits."""
    digests = [_image_digests(pairs) for pairs in sets]
    leaks = []
    for (one, first), (other, second) in combinations(list(zip(sets, digests, strict=True)), 2):
        people = tuple(sorted(_people(one) & _people(other)))
        images = tuple(sorted((first[key], second[key]) for key in first.keys() & second.keys()))
        if people or images:
            leaks.append(Leak(one.name, other.name, people, images))
    return leaks


def shared_people(people: Mapping[str, set[str]]) -> list[Leak]:
    """The leaks between any two sets by the names of their people, before images are embedded."""
    shared = [(one, other, people[one] & people[other]) for one, other in combinations(people, 2)]
    return [Leak(one, other, tuple(sorted(names)), ()) for one, other, names in shared if names]


def check_apart(train: LabelledPairs, dev: LabelledPairs) -> None:
    """Raise `UsageError` if all dev pairs are training pairs."""
    if np.isin(_pair_keys(dev), _pair_keys(train)).all():
        raise UsageError("every dev pair is among the training pairs: dev must show how the head does on others")


def _people(pairs: LabelledPairs) -> set[str]:
    return {pairs.persons[image] for image in pairs.images().tolist() if image in pairs.persons}


def _digest(vector: np.ndarray) -> bytes:
    return hashlib.blake2b(vector.tobytes(), digest_size=DIGEST_BYTES).digest()


def _image_digests(pairs: LabelledPairs) -> dict[bytes, str]:
    """The paths of all images that occur in a pair, by the digest of their embedding."""
    paths = pairs.image_paths
    return {
        _digest(pairs.vectors[image]): paths[image] if paths else f"image {image}"
        for image in pairs.images().tolist()
    }


def _pair_keys(pairs: LabelledPairs) -> np.ndarray:
    """(N,) uint64 hashes of both images of each pair, whatever their order."""
    hashes = np.zeros(len(pairs.vectors), np.uint64)
    for image in pairs.images().tolist():
        hashes[image] = int.from_bytes(_digest(pairs.vectors[image])[:8], "little")
    a, b = hashes[pairs.a], hashes[pairs.b]
    return np.minimum(a, b) * np.uint64(0x9E3779B97F4A7C15) + np.maximum(a, b)  # wraps around


def _count_and_list(singular: str, plural: str, names: Sequence[str]) -> str:
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names):,} {singular if len(names) == 1 else plural} ({', '.join(names[:SHOWN])}{more})"
