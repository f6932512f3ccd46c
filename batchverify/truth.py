"""The truth of scored pairs from a manifest of labels, whatever its order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import ManifestError
from batchverify.manifest.columns import LABEL, check_label_type, read_labels, read_paths
from batchverify.manifest.tables import TableFile, find_files
from batchverify.score_files import ScoreFile
from batchverify.scores import UNKNOWN

# Scored pairs searched for at once.
BITE = 2_000_000


def read_truth(manifest: str, scores: ScoreFile) -> np.ndarray:
    """(N,) int8: the truth of each scored pair, -1 where the manifest does not state it.

    Pairs are found by the cells of their two image columns, in either order. Raises `ManifestError` for a
    manifest without labels, for pairs with two labels, and where no pair is found.
    """
    keys, labels = _labelled(manifest, scores.sides)
    names, first = _unique(keys)
    truth = labels[first]
    clash = np.flatnonzero(labels != truth[names])
    if len(clash):
        pair = " and ".join(keys[int(clash[0])].as_py().split("\0"))
        raise ManifestError(f"{manifest}: the pair {pair} has label 0 in one row and 1 in another")
    distinct = keys.take(pa.array(first))
    found = []
    for wanted in _bites(scores):
        places = pc.index_in(wanted, value_set=distinct).fill_null(-1).to_numpy()
        found.append(np.where(places >= 0, truth[places], np.int8(UNKNOWN)))
    known = np.concatenate(found)
    if (known == UNKNOWN).all():
        raise ManifestError(
            f"{manifest}: labels none of the pairs of {scores.name}; pairs are found by the cells of "
            f"{' and '.join(scores.sides)}, which must be equal"
        )
    return known


def _bites(scores: ScoreFile) -> Iterator[pa.LargeStringArray]:
    """The keys of the scored pairs, many at a time: every search makes an index of all labels anew."""
    keys: list[pa.LargeStringArray] = []
    for batch in scores.batches(scores.sides):
        keys.append(_keys(batch.column(0), batch.column(1)))
        if sum(map(len, keys)) >= BITE:
            yield pa.concat_arrays(keys)
            keys = []
    if keys:
        yield pa.concat_arrays(keys)


def _labelled(manifest: str, sides: tuple[str, str]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The keys and labels of a manifest's rows that have one."""
    keys, labels = [], []
    for key, label in _rows(manifest, sides):
        stated = label.is_valid()
        keys.append(key.filter(stated))
        labels.append(label.filter(stated).to_numpy())
    if not sum(map(len, keys)):
        raise ManifestError(f"{manifest}: no row has a label")
    return pa.concat_arrays(keys), np.concatenate(labels).astype(np.int8)


def _rows(manifest: str, sides: tuple[str, str]) -> Iterator[tuple[pa.LargeStringArray, pa.Int8Array]]:
    for location in find_files(manifest):
        file, row = TableFile(location), 0
        schema = file.schema()
        for name in (*sides, LABEL):
            if name not in schema.names:
                listed = ", ".join(schema.names)
                raise ManifestError(f"{location}: no column '{name}'; the file has {listed}")
        check_label_type(str(location), schema.field(LABEL).type)
        for batch in file.batches(schema):
            paths = [read_paths(batch.column(name), str(location), row, name) for name in sides]
            yield _keys(*paths), read_labels(batch.column(LABEL), str(location), row)
            row += batch.num_rows


def _keys(a: pa.Array, b: pa.Array) -> pa.LargeStringArray:
    """One text a pair, the same for (a, b) and (b, a); NUL is in no path."""
    # Large: ten million pairs have more than 2 GiB of paths.
    a, b = (each.cast(pa.large_string()).fill_null("") for each in (a, b))
    swapped = pc.greater(a, b)
    ends = pc.if_else(swapped, b, a), pc.if_else(swapped, a, b)
    return pc.binary_join_element_wise(*ends, pa.scalar("\0", pa.large_string()))


def _unique(keys: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the number of each key among the distinct ones, and (D,) where each of those stands first."""
    names = keys.dictionary_encode().indices.to_numpy()
    return names, np.unique(names, return_index=True)[1]
