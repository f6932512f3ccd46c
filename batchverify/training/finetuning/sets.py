"""Labelled images for fine-tuning, and the batches of an epoch: pairs, or several images of several people."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchverify.errors import UsageError

UNKNOWN = -1
# Images of a person in a batch of people, at most.
IMAGES_PER_PERSON = 4
# What draws of different purposes add to the seed.
ORDER, VIEWS = 1, 2


@dataclass(frozen=True)
class Batch:
    """The images of one pass through the network and what is known of them.

    images: (B,) int64 indices into the set, each once. views: (B,) int64, 0 the face itself. a, b: (P,) int64
    positions in `images` of P labelled pairs. labels: (P,) int8, 0 same or 1 different. people: (B,) int64 from 0,
    -1 unknown.
    """

    images: np.ndarray
    views: np.ndarray
    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray
    people: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class LabelledImages:
    """N labelled pairs among M images.

    a, b: (N,) int32 indices of images. labels: (N,) int8, 0 same or 1 different. people: (M,) int32 numbers of
    people, -1 unknown. name: for messages. Images that are in no pair are not used.
    """

    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray
    people: np.ndarray
    name: str = "training"

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def images(self) -> np.ndarray:
        """(U,) indices of the images that are in a pair, sorted."""
        return np.unique(np.concatenate([self.a, self.b]))

    @cached_property
    def classes(self) -> np.ndarray:
        """(M,) int64 people from 0 without gaps; -1 for images without a person and those in no pair."""
        numbers = np.full(len(self.people), UNKNOWN, np.int64)
        known = self.images[self.people[self.images] >= 0]
        numbers[known] = np.unique(self.people[known], return_inverse=True)[1]
        return numbers

    @cached_property
    def identities(self) -> np.ndarray:
        """(M,) int64 as `classes`, but images without a person belong to those that same pairs join them with.

        Such groups count as different people, which pairs alone cannot say for certain.
        """
        joined = np.arange(len(self.people) + self.class_count)
        of_person = self.classes >= 0
        joined[: len(self.people)][of_person] = len(self.people) + self.classes[of_person]
        for a, b in zip(*(side[self.labels == 0].tolist() for side in (self.a, self.b)), strict=True):
            # A label says less than two names.
            if not (of_person[a] and of_person[b]):
                joined[_root(joined, a)] = _root(joined, b)
        roots = np.array([_root(joined, image) for image in self.images.tolist()])
        numbers = np.full(len(self.people), UNKNOWN, np.int64)
        numbers[self.images] = np.unique(roots, return_inverse=True)[1]
        return numbers

    @property
    def class_count(self) -> int:
        """The number of people in `classes`."""
        return int(self.classes.max(initial=UNKNOWN)) + 1

    def digest(self) -> str:
        """A hash of the pairs and people."""
        arrays = (self.a, self.b, self.labels, self.people)
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

    def few(self, pairs: int, seed: int) -> LabelledImages:
        """At most `pairs` pairs of each label, drawn."""
        rng = np.random.default_rng(seed)
        rows = np.sort(
            np.concatenate([rng.permutation(np.flatnonzero(self.labels == label))[:pairs] for label in (0, 1)])
        )
        return LabelledImages(self.a[rows], self.b[rows], self.labels[rows], self.people, self.name)


def _root(joined: np.ndarray, index: int) -> int:
    """The representative of an index; what lies on the way gets nearer to it."""
    while joined[index] != index:
        joined[index] = joined[joined[index]]
        index = int(joined[index])
    return index


@dataclass(frozen=True)
class PairBatches:
    """Batches of labelled pairs, `size` each; their order depends on the seed and the epoch alone.

    A rest that fills no batch waits for another epoch, which has another order. Raises `UsageError` for batches
    larger than the set.
    """

    pairs: LabelledImages
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.size > len(self.pairs):
            raise UsageError(
                f"--batch-images {2 * self.size} takes {self.size:,} pairs, but there are only "
                f"{len(self.pairs):,} {self.pairs.name} pairs: give at most {2 * len(self.pairs)}"
            )

    def __len__(self) -> int:
        return len(self.pairs) // self.size

    def epoch(self, number: int, views: int) -> Iterator[Batch]:
        """The batches of an epoch, with views from 0 to `views`."""
        order = np.random.default_rng((self.seed, ORDER, number)).permutation(len(self.pairs))
        for index in range(len(self)):
            rows = order[index * self.size : (index + 1) * self.size]
            yield pair_batch(self.pairs, rows, views, (self.seed, number, index))


@dataclass(frozen=True)
class PeopleBatches:
    """Batches of `size` chunks, each up to `IMAGES_PER_PERSON` images of one person.

    identities: (M,) int64, -1 for images that are not used. An epoch takes every image once, but for a rest that
    fills no batch. Raises `UsageError` for fewer than two people and for batches larger than the set.
    """

    pairs: LabelledImages
    identities: np.ndarray
    size: int
    seed: int

    def __post_init__(self) -> None:
        people, chunks = len(self.members), sum(self._chunks_of(images) for images in self.members)
        if people < 2:
            raise UsageError(
                f"the {self.pairs.name} images show {people} known person{'' if people == 1 else 's'}: "
                "this loss tells people apart and needs at least 2"
            )
        if all(len(images) < 2 for images in self.members):
            raise UsageError(
                f"no person of the {self.pairs.name} images has 2 images: this loss brings the images of one "
                "person together"
            )
        if self.size > chunks:
            raise UsageError(
                f"--batch-images {self.size * IMAGES_PER_PERSON} takes up to {IMAGES_PER_PERSON} images of "
                f"{self.size} people, which the {self.pairs.name} images do not fill: give at most "
                f"{chunks * IMAGES_PER_PERSON}"
            )

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The images of each person."""
        known = np.flatnonzero(self.identities >= 0)
        order = known[np.argsort(self.identities[known], kind="stable")]
        return np.split(order, np.flatnonzero(np.diff(self.identities[order])) + 1) if len(order) else []

    def __len__(self) -> int:
        return sum(self._chunks_of(images) for images in self.members) // self.size

    def epoch(self, number: int, views: int) -> Iterator[Batch]:
        """The batches of an epoch, with views from 0 to `views`."""
        rng = np.random.default_rng((self.seed, ORDER, number))
        chunks: list[np.ndarray] = []
        for images in self.members:
            # Cut evenly: a chunk of one image would bring no pair of that person.
            chunks += np.array_split(rng.permutation(images), self._chunks_of(images))
        order = rng.permutation(len(chunks))
        for index in range(len(self)):
            taken = [chunks[chunk] for chunk in order[index * self.size : (index + 1) * self.size]]
            yield people_batch(np.concatenate(taken), self.identities, views, (self.seed, number, index))

    @staticmethod
    def _chunks_of(images: Sequence[int] | np.ndarray) -> int:
        return -(-len(images) // IMAGES_PER_PERSON)


Batches = PairBatches | PeopleBatches


def pair_batch(pairs: LabelledImages, rows: np.ndarray, views: int = 0, key: Sequence[int] = ()) -> Batch:
    """The batch of some pairs, by index. key: what the views are drawn by."""
    images, places = np.unique(np.concatenate([pairs.a[rows], pairs.b[rows]]), return_inverse=True)
    a, b = places[: len(rows)], places[len(rows) :]
    drawn = _drawn_views(len(images), views, key)
    return Batch(images.astype(np.int64), drawn, a, b, pairs.labels[rows], pairs.classes[images])


def people_batch(images: np.ndarray, identities: np.ndarray, views: int = 0, key: Sequence[int] = ()) -> Batch:
    """The batch of some images with all pairs of them. key: what the views are drawn by."""
    people = identities[images]
    a, b = np.triu_indices(len(images), 1)
    labels = (people[a] != people[b]).astype(np.int8)
    return Batch(images.astype(np.int64), _drawn_views(len(images), views, key), a, b, labels, people)


def _drawn_views(images: int, views: int, key: Sequence[int]) -> np.ndarray:
    if not views:
        return np.zeros(images, np.int64)
    return np.random.default_rng((*key, VIEWS)).integers(0, views + 1, images)
