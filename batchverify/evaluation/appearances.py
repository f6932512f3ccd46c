"""In which rows of a finished output given images appear."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.evaluation.scores import ScoreFile
from batchverify.manifest.paths import ImageRoot, resolve_many, to_bytes
from batchverify.storage.location import Location


@dataclass(frozen=True)
class Appearances:
    """rows: rows of `output` that name at least one of the images. images: how many of the images it names."""

    output: str
    rows: int
    images: int

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def find_appearances(output: str, images: Collection[str]) -> Appearances:
    """Look for images, absolute paths or URIs, in an output of `score`; nothing is changed.

    Relative paths in the output start where its run record says. Raises `ManifestError` if it is not a finished
    output.
    """
    scores = ScoreFile.open(output)
    roots = scores.record.get("job", {}).get("image_root") or "."
    finders = [ImageRoot(Location.parse(root)) for root in ([roots] if isinstance(roots, str) else roots)]
    wanted = pa.array(sorted(map(to_bytes, images)), pa.large_binary())
    rows, seen = 0, np.zeros(len(wanted), np.bool_)
    for batch in scores.batches(scores.sides):
        hit = np.zeros(batch.num_rows, np.bool_)
        for cells in batch.columns:
            for finder in finders:
                found = pc.index_in(resolve_many(finder, cells.cast(pa.string())), value_set=wanted)
                hit |= found.is_valid().to_numpy(zero_copy_only=False)
                seen[found.drop_null().to_numpy()] = True
        rows += int(hit.sum())
    return Appearances(output, rows, int(seen.sum()))
