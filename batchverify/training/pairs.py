"""Labelled pairs for training: gathered, checked, drawn, and kept apart from the development set."""

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

# Images whose pairs make the table of false accept rates: 224,115 pairs at most support the lowest rate twice
# over.
MOST_IMPOSTORS = 670
BLOCK = 4096
SHOWN = 5
DIGEST_BYTES = 16


@dataclass(frozen=True)
class LeftOut:
    """A row whose pair has no two embeddings: file, row from 1, and the reason of each side or None."""

    file: str
    row: int
    error_a: str | None
    error_b: str | None

    def __str__(self) -> str:
        sides = {"image_a": self.error_a, "image_b": self.error_b}
        why = ", ".join(f"{side} {reason}" for side, reason in sides.items() if reason)
        return f"{self.file}: row {self.row}: {why}"


@dataclass(frozen=True)
class LabelledPairs:
    """N labelled pairs among M images.

    vectors: (M, 512) float16 unit rows. a, b: (N,) int32 indices of images. labels: (N,) int8, 0 or 1.
    name: for messages. image_paths: path by image. persons: person by image, where the manifest says so.
    left_out: the rows that could not be embedded. originals: how many pairs, from the first, are not of
    augmented views; None for all. views: how many views of all images follow the images in `vectors`.
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
        """Gather a manifest's pairs; blank persons are nobody.

        Raises `ManifestError` for a manifest without labels or with a blank one.
        """
        parts: list[tuple[np.ndarray, ...]] = []
        left_out: list[LeftOut] = []
        persons: dict[int, str] = {}
        for block in manifest.blocks(scan):
            labels = _labels(manifest, scan, block)
            kept = embeddings.usable(block.a, block.b)
            left_out += _left_out(manifest, scan, embeddings, block, kept)
            indices = (block.a[kept].astype(np.int32), block.b[kept].astype(np.int32))
            parts.append((*indices, labels[kept]))
            persons.update(_persons(block))
        a, b, all_labels = (np.concatenate(each) for each in zip(*parts, strict=True))
        image_paths = tuple(str(each) for each in scan.images)
        return cls(embeddings.vectors, a, b, all_labels, name, image_paths, persons, tuple(left_out))

    def check(self, fewest: int = 1) -> None:
        """`UsageError` for pairs that nothing can be learned from.

        That is without both labels, fewer than `fewest`, or with vectors that are not finite.
        """
        same, different = int((self.labels == 0).sum()), int((self.labels == 1).sum())
        if min(same, different) < 1 or same + different != len(self):
            raise UsageError(
                f"the {self.name} pairs need label 0 and label 1: "
                f"of {len(self):,} pairs {same:,} are same and {different:,} different"
            )
        if len(self) < fewest:
            raise UsageError(f"the {self.name} pairs are {len(self)}: fewer than {fewest} teach nothing")
        broken = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if len(broken):
            first = f" (first: {self.image_paths[broken[0]]})" if self.image_paths else ""
            raise UsageError(
                f"the {self.name} pairs hold {len(broken):,} embeddings that are not finite{first}: "
                "`cache verify` finds them"
            )

    def subset(self, chosen: np.ndarray) -> LabelledPairs:
        """Some of the pairs, by a mask or by indices, among the same images."""
        return replace(self, a=self.a[chosen], b=self.b[chosen], labels=self.labels[chosen], originals=None)

    def with_views(self, views: Sequence[np.ndarray], seed: int) -> LabelledPairs:
        """The pairs, and each again for every view: of its images drawn from all views, the plain one too.

        views: (M, 512) float16 each, of the same images; where one has no vector (zero), the plain one serves.
        """
        tables = [
            self.vectors,
            *(np.where(each.any(axis=1, keepdims=True), each, self.vectors) for each in views),
        ]
        rng, count = np.random.default_rng(seed), len(self.vectors)
        draws = rng.integers(0, len(tables), (2, len(views), len(self))).astype(np.int32) * count
        return replace(
            self,
            vectors=np.concatenate(tables),
            a=np.concatenate([self.a, (self.a + draws[0]).ravel()]),
            b=np.concatenate([self.b, (self.b + draws[1]).ravel()]),
            labels=np.tile(self.labels, 1 + len(views)),
            image_paths=self.image_paths * len(tables),
            persons={
                image + view * count: person
                for view in range(len(tables))
                for image, person in self.persons.items()
            },
            originals=len(self),
            views=len(views),
        )

    def draw(self, most: int, seed: int) -> LabelledPairs:
        """At most so many pairs of each label, drawn with a seed."""
        rng = np.random.default_rng(seed)
        kept = [rng.permutation(np.flatnonzero(self.labels == label))[:most] for label in (0, 1)]
        return self.subset(np.sort(np.concatenate(kept)))

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(a, b, labels) in order, a few at a time: (B, 512) float32 twice, (B,) float32."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a, b, labels) of some pairs, by their indices."""
        sides = (torch.from_numpy(self.vectors[side[rows]]).float() for side in (self.a, self.b))
        a, b = sides
        return a, b, torch.from_numpy(self.labels[rows]).float()

    def groups(self) -> np.ndarray:
        """(M,) int64: equal for images of one person; an image of nobody known is a group of its own."""
        names: dict[str, int] = {}
        # The views of an image are one picture.
        images = len(self.vectors) // (1 + self.views)
        groups = np.arange(len(self.vectors), dtype=np.int64) % images + len(self.persons)
        for image, person in self.persons.items():
            groups[image] = names.setdefault(person, len(names))
        return groups

    def impostor_pairs(self) -> LabelledPairs:
        """`all_pairs` of two people, or the labelled different pairs where these are more."""
        pairs = self.all_pairs()
        named, labelled = pairs.subset(pairs.labels == 1), self.subset(self.labels == 1)
        return named if len(named) >= len(labelled) else labelled

    def all_pairs(self) -> LabelledPairs:
        """Every pair of images of known people; without person columns, the labelled pairs alone.

        Of more than `MOST_IMPOSTORS` images a fixed draw is taken: pairs grow with the square of the images.
        """
        if not self.persons:
            return self
        # An image that failed has no vector: its row is zero.
        images = np.array(sorted(index for index in self.persons if self.vectors[index].any()), np.int32)
        if len(images) > MOST_IMPOSTORS:
            images = np.sort(np.random.default_rng(0).choice(images, MOST_IMPOSTORS, replace=False))
        groups = self.groups()[images]
        first, second = np.triu_indices(len(images), 1)
        labels = (groups[first] != groups[second]).astype(np.int8)
        return replace(self, a=images[first], b=images[second], labels=labels, originals=None)


def count_labels(manifest: Manifest, scan: Scan) -> tuple[int, int]:
    """(same, different) rows. Raises `ManifestError` for a manifest without labels or with a blank one."""
    counts = np.zeros(2, np.int64)
    for block in manifest.blocks(scan):
        counts += np.bincount(_labels(manifest, scan, block), minlength=2)
    same, different = counts.tolist()
    return same, different


def people_of(manifest: Manifest, scan: Scan) -> set[str]:
    """The names of all people in a manifest; empty where it names none."""
    return {person for block in manifest.blocks(scan) for _, person in _persons(block)}


def _persons(block: Block) -> Iterator[tuple[int, str]]:
    """(image, person) of a block's images with a name."""
    for column, images in (("person_a", block.a), ("person_b", block.b)):
        if column in block.carried.schema.names:
            people = zip(images.tolist(), block.carried.column(column).to_pylist(), strict=True)
            yield from ((image, _name(person)) for image, person in people if person not in (None, ""))


def _name(person: Any) -> str:
    """A person's name; whole numbers are one person with and without a fraction, as pandas writes them."""
    return str(int(person)) if isinstance(person, float) and person.is_integer() else str(person)


def _labels(manifest: Manifest, scan: Scan, block: Block) -> np.ndarray:
    """(N,) int8: the labels of a block; `ManifestError` where there are none or one is blank."""
    if not manifest.has_label:
        raise ManifestError(f"{manifest.names[0]}: the manifest has no column 'label': nothing to learn from")
    cells = block.carried.column(block.carried.schema.get_field_index(TRUE_LABEL))
    if cells.null_count:
        row = int(np.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False))[0])
        file, number = manifest.locate(scan, block.first + row)
        raise ManifestError(f"{file}: row {number}: the label is blank; training needs 0 or 1 in every row")
    labels: np.ndarray = cells.to_numpy()
    return labels


def _left_out(
    manifest: Manifest, scan: Scan, embeddings: EmbeddingTable, block: Block, kept: np.ndarray
) -> list[LeftOut]:
    rows = np.flatnonzero(~kept)
    a, b = (embeddings.reasons(side[rows]).to_pylist() for side in (block.a, block.b))
    places = (manifest.locate(scan, block.first + int(row)) for row in rows)
    return [LeftOut(*place, *reasons) for place, *reasons in zip(places, a, b, strict=True)]


@dataclass(frozen=True)
class Leak:
    """What two sets share. people: names, sorted. images: the same picture's path in the one and in the other."""

    first: str
    second: str
    people: tuple[str, ...]
    images: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        found = []
        if self.people:
            found.append(_some("person", "people", self.people))
        if self.images:
            found.append(_some("identical image", "identical images", [a for a, _ in self.images]))
        return f"{self.first} and {self.second} share {' and '.join(found)}"

    def to_json(self) -> dict[str, Any]:
        """Everything, for the training record."""
        return dict(vars(self))


def find_leaks(sets: Sequence[LabelledPairs]) -> list[Leak]:
    """What each two of the sets share, where they share anything.

    Pictures are the same when their embeddings are, bit for bit: equal files under two names, too.
    """
    digests = [_pictures(each) for each in sets]
    leaks = []
    for (one, first), (other, second) in combinations(list(zip(sets, digests, strict=True)), 2):
        people = tuple(sorted(set(_people(one)) & set(_people(other))))
        images = tuple(sorted((first[key], second[key]) for key in first.keys() & second.keys()))
        if people or images:
            leaks.append(Leak(one.name, other.name, people, images))
    return leaks


def shared_people(people: Mapping[str, set[str]]) -> list[Leak]:
    """What each two sets share by the names of their people alone, by set: no image need be read for it."""
    both = [(one, other, people[one] & people[other]) for one, other in combinations(people, 2)]
    return [Leak(one, other, tuple(sorted(names)), ()) for one, other, names in both if names]


def check_apart(train: LabelledPairs, dev: LabelledPairs) -> None:
    """`UsageError` for a dev set whose pairs are all among the training pairs."""
    if np.isin(_pair_keys(dev), _pair_keys(train)).all():
        raise UsageError(
            "every dev pair is among the training pairs: nothing would show what the head is worth on others"
        )


def _used(pairs: LabelledPairs) -> np.ndarray:
    return np.unique(np.concatenate([pairs.a, pairs.b]))


def _people(pairs: LabelledPairs) -> list[str]:
    return [pairs.persons[image] for image in _used(pairs).tolist() if image in pairs.persons]


def _digest(vector: np.ndarray) -> bytes:
    return hashlib.blake2b(vector.tobytes(), digest_size=DIGEST_BYTES).digest()


def _pictures(pairs: LabelledPairs) -> dict[bytes, str]:
    """The path of each picture that a pair uses, by what its embedding hashes to."""
    names = pairs.image_paths
    return {
        _digest(pairs.vectors[image]): names[image] if names else f"image {image}"
        for image in _used(pairs).tolist()
    }


def _pair_keys(pairs: LabelledPairs) -> np.ndarray:
    """(N,) uint64 hashes of both pictures of a pair, in whatever order it names them."""
    hashes = np.zeros(len(pairs.vectors), np.uint64)
    for image in _used(pairs).tolist():
        hashes[image] = int.from_bytes(_digest(pairs.vectors[image])[:8], "little")
    a, b = hashes[pairs.a], hashes[pairs.b]
    return np.minimum(a, b) * np.uint64(0x9E3779B97F4A7C15) + np.maximum(a, b)  # wraps around


def _some(one: str, several: str, names: Sequence[str]) -> str:
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names):,} {one if len(names) == 1 else several} ({', '.join(names[:SHOWN])}{more})"
