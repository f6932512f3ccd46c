"""`prepare`: manifests from LFW's own files or from a tree with one folder per person.

Every manifest has the columns `COLUMNS`, with label 0 for the same person and 1 for different people, and paths
relative to its own folder. No cell is a formula of a spreadsheet (`spreadsheet.py`). All draws use only
`random.Random(seed).random()`, whose sequence is the same in every version of Python, so a seed gives the same
manifests everywhere.
"""

from __future__ import annotations

import csv
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import comb, isqrt, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.spreadsheet import safe_name, safe_path

COLUMNS = ("image_a", "image_b", "label", "person_a", "person_b")
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
DEFAULT_PAIRS: Mapping[str, int] = MappingProxyType({"train": 1024, "dev": 76, "test": 500})

# 76 of the 1,100 pairs of each class, which leaves 1,024 to train on. LFW's list has 321 groups of one same pair
# and 216 of one different pair, so adding groups reaches exactly 76 with every seed.
_DEV_SHARE = DEFAULT_PAIRS["dev"] / 1100
_COUNTS = re.compile(r"(?:([1-9]\d{0,8})\s+)?([1-9]\d{0,8})", re.ASCII)
_ROW = re.compile(r"([^\t/\0]+)\t([1-9]\d{0,8})(?:\t([^\t/\0]+))?\t([1-9]\d{0,8})", re.ASCII)
_People = dict[str, list[Path]]


@dataclass(frozen=True)
class Prepared:
    """What was written, by split ("train", "dev", "test", "pairs").

    missing: images that are absent or unreadable, sorted, with the paths that the manifest would have. dropped: the
    number of rows left out of each split because of them.
    """

    manifests: dict[str, Path]
    rows: dict[str, int]
    missing: tuple[str, ...]
    dropped: dict[str, int]

    def to_json(self) -> dict[str, object]:
        """Everything, for `--json`."""
        return {**vars(self), "manifests": {split: str(path) for split, path in self.manifests.items()}}


class _Pair(NamedTuple):
    """One row, in the order of `COLUMNS`. The image paths are absolute until the row is written."""

    image_a: Path
    image_b: Path
    label: int
    person_a: str
    person_b: str
    fold: int | None = None


def prepare_lfw(root: Path, output: Path, *, seed: int = 0) -> Prepared:
    """Write train.csv, dev.csv and test.csv of LFW's View 1, and pairs.csv of View 2 if ROOT has pairs.txt.

    Images are ROOT/lfw*/<Name>/<Name>_<NNNN>.jpg. Of several such folders the first by name with "deepfunneled"
    in it is taken, otherwise the first by name. dev.csv is split off pairsDevTrain.txt by groups of people linked
    by pairs, so it shares no person with train.csv. It gets 76 of 1,100 pairs of each class. From a list of
    another size it gets the same share or, if the groups do not allow that, a little less; more only if a class
    would otherwise be empty. The split does not depend on which images exist. Rows keep the order of their list.
    pairs.csv has one more column, `fold`, 1 to 10. View 2 repeats people of View 1.

    Raises `UsageError` for a missing list or image folder, `ManifestError` for a malformed list.
    """
    root, output = root.resolve(), _target(output)
    images = _lfw_images(root)
    training = root / "pairsDevTrain.txt"
    train, dev = _split_dev(training, _read_list(training, images, "View 1's training list"), seed)
    test = _read_list(root / "pairsDevTest.txt", images, "View 1's test list")
    splits = {"train": train, "dev": dev, "test": test}
    if (root / "pairs.txt").exists():
        splits["pairs"] = _read_list(root / "pairs.txt", images, "View 2's folds", folded=True)
    return _publish(splits, output)


def prepare_folders(root: Path, output: Path, *, seed: int = 0, pairs: Mapping[str, int] | None = None) -> Prepared:
    """Write train.csv, dev.csv and test.csv from ROOT/<person>/<image>. No person is in two of them.

    pairs: the number of pairs of each class by split (`DEFAULT_PAIRS`); a split that has 0 or is not named is not
    written. Images are the files with a suffix of `IMAGE_SUFFIXES` directly in a person's folder. Hidden names,
    other files and folders without images are ignored. Every split gets at least two people, one of them with two
    or more images. The rest are dealt by the square root of the number of pairs, or dev would have only two.

    Pairs are drawn without repetition, mirrored pairs included, and spread evenly: no person (no two people) gives
    another pair before all others who can have given as many. A split with too few possible pairs gets as many of
    both classes as its scarcer class has. Same pairs come first; each class is sorted.

    Raises `UsageError` for invalid `pairs` and for a tree with too few people or images.
    """
    wanted = {split: n for split, n in (DEFAULT_PAIRS if pairs is None else pairs).items() if n}
    if not wanted or not wanted.keys() <= DEFAULT_PAIRS.keys() or min(wanted.values()) < 0:
        raise UsageError(f"pairs must give train, dev or test a number above 0, got {pairs}")
    rng, output = random.Random(seed), _target(output)
    people = {folder.name: _entries(folder)[1] for folder in _entries(root.resolve())[0]}
    shares = _deal(root, {name: images for name, images in people.items() if images}, wanted, rng)
    return _publish({split: _draw(shares[split], wanted[split], rng) for split in wanted}, output)


def _lfw_images(root: Path) -> Path:
    """The folder with LFW's images, chosen as `prepare_lfw` describes."""
    candidates = [folder for folder in _entries(root)[0] if folder.name.startswith("lfw")]
    folders = [folder for folder in candidates if any(_entries(person)[1] for person in _entries(folder)[0])]
    if not folders:
        raise UsageError(f"{root}: no folder with LFW's images, lfw*/<Name>/<Name>_0001.jpg")
    return min(folders, key=lambda folder: ("deepfunneled" not in folder.name, folder.name))


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """(folders, images) directly in a folder, without hidden names, sorted by name."""
    folders, images = [], []
    try:
        for entry in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            if entry.is_dir():
                folders.append(entry)
            elif entry.suffix.lower() in IMAGE_SUFFIXES:
                images.append(entry)
    except OSError as exc:
        raise UsageError(f"{folder}: cannot be read as a folder: {exc.strerror}") from exc
    return folders, images


def _read_list(path: Path, images: Path, what: str, *, folded: bool = False) -> list[_Pair]:
    """Read a list of LFW: a line with counts, then same pairs before different pairs in each fold."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as exc:
        raise ManifestError(f"{path}: byte {exc.start}: not UTF-8 text") from exc
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}; LFW's {what} is needed here") from exc
    counts = _COUNTS.fullmatch(lines[0].strip())
    if counts is None or bool(counts[1]) != folded:
        layout = "the numbers of folds and of pairs" if folded else "the number of pairs"
        raise ManifestError(f"{path}: line 1: expected {layout}, got {lines[0]!r}")
    count, rows = int(counts[2]), len(lines) - 1
    if rows != (announced := 2 * count * int(counts[1] or 1)):
        raise ManifestError(f"{path}: line 1: announces {announced} rows, the file has {rows}")
    pairs = []
    for number, line in enumerate(lines[1:]):
        fold, position = divmod(number, 2 * count)
        pair = _read_pair(f"{path}: line {number + 2}", line, images, different=position >= count)
        pairs.append(pair._replace(fold=fold + 1) if folded else pair)
    return pairs


def _read_pair(where: str, line: str, images: Path, *, different: bool) -> _Pair:
    """One row of a list. where: file and line, for error messages."""
    match = _ROW.fullmatch(line.strip(" "))
    if match is None or bool(match[3]) != different or match[1] == match[3]:
        layout = "name, number, another name, number" if different else "name, number, number"
        raise ManifestError(f"{where}: expected {layout} with tabs between them, got {line!r}")
    a, b = match[1], match[3] or match[1]
    image_a, image_b = images / a / f"{a}_{match[2]:0>4}.jpg", images / b / f"{b}_{match[4]:0>4}.jpg"
    return _Pair(image_a, image_b, int(different), a, b)


def _split_dev(path: Path, rows: list[_Pair], seed: int) -> tuple[list[_Pair], list[_Pair]]:
    """(train, dev), both in the order of the list and without common people."""
    groups = _linked(rows)
    groups = [groups[n] for n in _numbers(len(groups), random.Random(seed))]
    wanted = max(1, round(len(rows) // 2 * _DEV_SHARE))
    while wanted < len(rows) // 2:
        dev: set[int] = set()
        room = (wanted, wanted)
        for group in groups:
            different = sum(rows[n].label for n in group)
            left = (room[0] - len(group) + different, room[1] - different)
            if min(left) >= 0:
                room = left
                dev.update(group)
        if max(room) < wanted:
            return [row for n, row in enumerate(rows) if n not in dev], [rows[n] for n in sorted(dev)]
        wanted += max(1, wanted // 4)
    raise ManifestError(f"{path}: no dev list can be split off, because pairs link all people in the list")


def _linked(rows: list[_Pair]) -> list[list[int]]:
    """Row numbers by connected component of the graph with people as nodes and pairs as edges."""
    parents: dict[str, str] = {}
    for row in rows:
        parents[_representative(parents, row.person_a)] = _representative(parents, row.person_b)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_representative(parents, row.person_a), []).append(number)
    return list(groups.values())


def _representative(parents: dict[str, str], person: str) -> str:
    while parents.setdefault(person, person) != person:
        parents[person] = person = parents[parents[person]]
    return person


def _deal(root: Path, people: _People, wanted: dict[str, int], rng: random.Random) -> dict[str, _People]:
    """Each split's share of the people, as `prepare_folders` describes it."""
    able = sum(len(images) > 1 for images in people.values())
    if len(people) < 2 * len(wanted) or able < len(wanted):
        raise UsageError(
            f"{root}: {len(people)} folders with images, {able} of them with two or more; {', '.join(wanted)} need "
            f"{2 * len(wanted)} and {len(wanted)}, with one folder per person"
        )
    names = list(people)
    shuffled = [names[n] for n in _numbers(len(names), rng)]
    given: dict[str, list[str]] = {split: [] for split in wanted}
    # People with two or more images come first, so that every split has one of them before any has two.
    for person in sorted(shuffled, key=lambda person: len(people[person]) < 2):
        neediest = min(given, key=lambda split: (len(given[split]) > 1, len(given[split]) / sqrt(wanted[split])))
        given[neediest].append(person)
    return {split: {name: people[name] for name in sorted(given[split])} for split in given}


def _draw(people: dict[str, list[Path]], wanted: int, rng: random.Random) -> list[_Pair]:
    """Up to `wanted` same pairs and as many different ones."""
    names, images = list(people), list(people.values())
    same = sum(comb(len(own), 2) for own in images)
    count = min(wanted, same, comb(sum(map(len, images)), 2) - same)
    alone = ((a, a, comb(len(images[a]), 2)) for a in _numbers(len(names), rng))
    couples = map(_couple, _numbers(comb(len(names), 2), rng))
    together = ((a, b, len(images[a]) * len(images[b])) for a, b in couples)
    rows = []
    for label, groups in enumerate((alone, together)):
        for a, b, member in islice(_in_turns(groups, rng), count):
            i, j = divmod(member, len(images[b])) if label else _couple(member)
            rows.append(_Pair(images[a][i], images[b][j], label, names[a], names[b]))
    return sorted(rows, key=lambda row: (row.label, row.image_a, row.image_b))


def _in_turns(groups: Iterable[tuple[int, int, int]], rng: random.Random) -> Iterator[tuple[int, int, int]]:
    """(a, b, member) for all members of every group (a, b, size), each once; the groups take turns."""
    turns: Iterable = ((a, b, _numbers(size, rng)) for a, b, size in groups)
    while turns:
        again = []
        for a, b, members in turns:
            for member in islice(members, 1):
                yield a, b, member
                again.append((a, b, members))
        turns = again


def _numbers(total: int, rng: random.Random) -> Iterator[int]:
    """The numbers below `total` in random order. The cost grows with the numbers taken, not with `total`."""
    moved: dict[int, int] = {}
    for last in range(total - 1, -1, -1):
        drawn = int(rng.random() * (last + 1))
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.pop(last, last)


def _couple(rank: int) -> tuple[int, int]:
    """The couple (i, j), i < j, at position `rank` in the sequence (0, 1), (0, 2), (1, 2), (0, 3), …"""
    j = (1 + isqrt(1 + 8 * rank)) // 2
    return rank - j * (j - 1) // 2, j


def _target(output: Path) -> Path:
    """The folder for the manifests; `UsageError` for `-`, which is none."""
    from batchverify.storage.location import Location  # which imports pyarrow

    return Path(Location.parse(output).path).resolve()


def _publish(splits: Mapping[str, list[_Pair]], output: Path) -> Prepared:
    """Write each split without the rows whose images are missing."""
    _require_distinct({person for rows in splits.values() for row in rows for person in row[3:5]})
    named = {image for rows in splits.values() for row in rows for image in row[:2]}
    missing = {image for image in named if not os.access(image, os.R_OK)}
    if missing == named:
        raise UsageError(f"{min(named)}: not found, and neither is any other of the {len(named)} images")
    manifests, counts, dropped = {}, {}, {}
    for split, rows in splits.items():
        kept = [row for row in rows if missing.isdisjoint(row[:2])]
        manifests[split] = _write(output / f"{split}.csv", kept, folded=rows[0].fold is not None)
        counts[split], dropped[split] = len(kept), len(rows) - len(kept)
    paths = sorted(os.path.relpath(image, output) for image in missing)
    return Prepared(manifests, counts, tuple(paths), dropped)


def _require_distinct(people: set[str]) -> None:
    """Raise `UsageError` for two names that a manifest would hold as one."""
    written: dict[str, str] = {}
    for person in sorted(people):
        other = written.setdefault(safe_name(person), person)
        if other != person:
            raise UsageError(f"{other} and {person} are both written as {safe_name(person)}: rename one of them")


def _write(path: Path, rows: list[_Pair], *, folded: bool) -> Path:
    """Write a manifest whole or not at all."""
    from batchverify.storage.location import Location  # which imports pyarrow

    columns = (*COLUMNS, "fold") if folded else COLUMNS
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(file, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writerow(columns)
        for row in rows:
            images = [safe_path(os.path.relpath(image, path.parent)) for image in row[:2]]
            people = [safe_name(person) for person in row[3:5]]
            writer.writerow([*images, row.label, *people, *row[5 : len(columns)]])
        Location(str(path)).write_bytes(buffer.getbuffer())
    except OSError as exc:
        raise UsageError(f"{path}: cannot be written: {exc.strerror}") from exc
    except UnicodeEncodeError as exc:
        raise UsageError(f"{path}: cannot hold {exc.object!r}, which is not valid UTF-8; rename these files") from exc
    return path
