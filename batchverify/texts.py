"""Texts that lie one after the other in a buffer, found by their bytes: compiled loops."""

from __future__ import annotations

import numpy as np

from batchverify.instructions import copy, fetch
from batchverify.machine_code import compiled

_WORD = 8
# Texts ahead whose bytes are fetched, a part of a line after the other.
_AHEAD = 8
_LINE = 40
# What a path's byte can be. No rule looks at the rest: not even UTF-8 beyond ASCII holds these bytes.
_OTHER, _LETTER, _DOT, _SLASH, _FORBIDDEN = range(5)
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[[*range(ord("0"), ord("9") + 1), *range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)]] = (
    _LETTER
)
_KINDS[ord(".")], _KINDS[ord("/")] = _DOT, _SLASH
_KINDS[[ord(":"), ord("?"), 0]] = _FORBIDDEN


@compiled
def is_plain(text: np.ndarray) -> bool:
    """Whether (N,) uint8 are a path that no rule looks at.

    It has a letter or digit, and no part that is empty, `.` or `..`, or holds a colon, a question mark or NUL.
    """
    size, dots, letters = 0, 0, 0
    for at in range(len(text)):
        kind = _KINDS[text[at]]
        if kind == _FORBIDDEN:
            return False
        if kind == _SLASH:
            if size == dots and size <= 2:
                return False
            size = dots = 0
        else:
            size += 1
            dots += kind == _DOT
            letters += kind == _LETTER
    return letters > 0 and not (size == dots and size <= 2)


@compiled
def hash_of(words: np.ndarray, size: int, seed: np.uint64, factor: np.uint64) -> np.int64:
    """A hash of `size` bytes, the last of (N,) uint64 words filled with zeros."""
    value = seed ^ np.uint64(size)
    for at in range((size + _WORD - 1) // _WORD):
        value = (value ^ words[at]) * factor
        value ^= value >> np.uint64(32)
    # Twice more: what differs in the last word's last bytes must reach the first bits, with unlucky factors, too.
    value *= factor
    value ^= value >> np.uint64(29)
    value *= factor
    return np.int64(value ^ value >> np.uint64(32))


@compiled
def hash_all(
    texts: tuple[np.ndarray, np.ndarray],
    frame: tuple[np.ndarray, np.ndarray],
    secret: tuple[np.uint64, np.uint64],
    plain: bool,
    found: tuple[np.ndarray, np.ndarray],
) -> None:
    """Hashes of N texts, each as it stands between the two of `frame`.

    texts: (N + 1,) int64 borders and their uint8. frame: uint8 each. secret: seed and factor. plain: of plain paths
    alone. found: (N,) int64 each, numbers, set to 0 or -1 for texts that are left out, and hashes.
    """
    borders, data = texts
    before, after = frame
    numbers, hashes = found
    around, longest = len(before) + len(after), 0
    for at in range(len(numbers)):
        longest = max(longest, borders[at + 1] - borders[at])
    scratch = np.zeros((around + longest + _WORD) // _WORD * _WORD, np.uint8)
    words = scratch.view(np.uint64)
    copy(before, scratch, 0)
    for at in range(len(numbers)):
        text = data[borders[at] : borders[at + 1]]
        if plain and not is_plain(text):
            numbers[at] = -1
            continue
        numbers[at] = 0
        middle, size = len(before) + len(text), around + len(text)
        copy(text, scratch, len(before))
        copy(after, scratch, middle)
        scratch[size : (size + _WORD - 1) // _WORD * _WORD] = 0
        hashes[at] = hash_of(words, size, secret[0], secret[1])


@compiled
def stands_at(part: np.ndarray, whole: np.ndarray, start: int) -> bool:
    """Whether (N,) uint8 are those from `start` on."""
    there = whole[start : start + len(part)]
    difference = np.uint8(0)
    for at in range(len(part)):
        difference |= part[at] ^ there[at]
    return difference == 0


@compiled
def is_framed(
    text: np.ndarray,
    frame: tuple[np.ndarray, np.ndarray],
    known: tuple[np.ndarray, np.ndarray, np.ndarray],
    number: int,
) -> bool:
    """Whether a text in its frame is the one with this number."""
    before, after = frame
    whole = known[1][known[0][number] : known[0][number + 1]]
    middle = len(before) + len(text)
    if len(whole) != middle + len(after):
        return False
    return (
        stands_at(text, whole, len(before))
        and stands_at(before, whole, 0)
        and stands_at(after, whole, middle)
    )


@compiled
def search_on(known_hashes: np.ndarray, table: np.ndarray, numbers: np.ndarray, hashes: np.ndarray) -> None:
    """Go on along the table where a number's hash is another."""
    mask = len(table) - 1
    other = np.empty(len(numbers), np.bool_)
    for at in range(len(numbers)):
        other[at] = known_hashes[max(numbers[at], 0)] != hashes[at]
    for at in range(len(numbers)):
        if other[at] and numbers[at] >= 0:
            slot = (hashes[at] + 1) & mask
            while table[slot] >= 0 and known_hashes[table[slot]] != hashes[at]:
                slot = (slot + 1) & mask
            numbers[at] = table[slot]


@compiled
def search_same(
    mine: np.ndarray,
    frame: tuple[np.ndarray, np.ndarray],
    known: tuple[np.ndarray, np.ndarray, np.ndarray],
    table: np.ndarray,
    value: int,
) -> int:
    """The number of one text among all near its hash; there is another text with the same hash."""
    slot = value & (len(table) - 1)
    while table[slot] >= 0 and not is_framed(mine, frame, known, table[slot]):
        slot = (slot + 1) & (len(table) - 1)
    return int(table[slot])


@compiled
def find_all(
    texts: tuple[np.ndarray, np.ndarray],
    frame: tuple[np.ndarray, np.ndarray],
    known: tuple[np.ndarray, np.ndarray, np.ndarray],
    table: np.ndarray,
    found: tuple[np.ndarray, np.ndarray],
) -> None:
    """The numbers of texts that `hash_all` has seen, -1 for those that are not known.

    known: (M + 1,) int64 borders, uint8 and (M,) int64 hashes of the numbered texts, M > 0. table: as `Slots`
    keeps it.
    """
    numbers, hashes = found
    borders, text, _ = known
    # One kind of look-up after the other, without waiting or choosing: the memory answers many at once.
    for at in range(len(numbers)):
        numbers[at] = table[hashes[at] & (len(table) - 1)] if numbers[at] == 0 else -1
    search_on(known[2], table, numbers, hashes)
    for at in range(len(numbers)):
        soon, sooner = (
            numbers[min(at + 2 * _AHEAD, len(numbers) - 1)],
            numbers[min(at + _AHEAD, len(numbers) - 1)],
        )
        fetch(borders, max(soon, 0))
        start = borders[max(sooner, 0)]
        fetch(text, start)
        fetch(text, min(start + _LINE, len(text) - 1))
        if numbers[at] >= 0:
            mine = texts[1][texts[0][at] : texts[0][at + 1]]
            if not is_framed(mine, frame, known, numbers[at]):
                numbers[at] = search_same(mine, frame, known, table, hashes[at])
