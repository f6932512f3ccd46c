"""Score tables of people in groups, and people in a table of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from score_tables import draw_columns

GROUPS = "abc"


def group_of(person: str, groups: Sequence[str] = GROUPS) -> str:
    """The group of `person N`."""
    return groups[int(person.split()[1]) % len(groups)]


def grouped_columns(
    pairs: int,
    seed: int = 0,
    *,
    people: int = 30,
    groups: Sequence[str] = GROUPS,
    failed: float = 0.05,
    **changes: Any,
) -> dict[str, Any]:
    """Columns of a score table with `group_a` and `group_b`, and a quality of each side that tells of errors."""
    columns = draw_columns(pairs, seed, people=people, failed=failed)
    rng = np.random.default_rng(seed + 1)
    truth = np.asarray(columns["true_label"])
    similarity = columns["similarity"].fill_null(0).to_numpy(zero_copy_only=False)
    good = np.where(truth == 0, similarity, 0.7) + rng.normal(0, 0.25, pairs)
    sides = {f"group_{side}": [group_of(each, groups) for each in columns[f"person_{side}"]] for side in "ab"}
    quality = {"sharpness_a": good, "sharpness_b": good + rng.random(pairs)}
    return {name: each for name, each in (columns | sides | quality | changes).items() if each is not None}


def write_people(path: Path, people: int = 30, groups: Sequence[str] = GROUPS) -> str:
    """A CSV file of people with their groups."""
    names = [f"person {each}" for each in range(people)]
    pd.DataFrame({"person": names, "origin": [group_of(each, groups) for each in names]}).to_csv(path, index=False)
    return str(path)
