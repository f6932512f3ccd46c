"""The guard against leaks: people and pictures that stand in two of train, dev and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from batchverify.errors import UsageError
from batchverify.labelled import LabelledPairs

SHOWN = 5
DIGEST_BYTES = 16


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
    names = pairs.references
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
