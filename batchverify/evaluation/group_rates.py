"""Error rates of groups of people: each group, all pairs of groups, and how far the groups are apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchverify.evaluation.bootstrap import Span, each_draw, exact_span, span_of
from batchverify.evaluation.differentials import measure_differentials
from batchverify.evaluation.document import Differentials, GroupMatrix, GroupRow, GroupsDocument
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.groups import EXAMPLES, Groups
from batchverify.evaluation.scores import NOT_STATED, Scores
from batchverify.heads.bounds import count_disjoint
from batchverify.heads.prior import Units

# The rates by the truth of their pairs.
RATES = ("fnmr", "fmr")
KINDS = ("same", "different")
# A group is too small for a rate if it should have fewer errors, or has fewer people.
LEAST_ERRORS, LEAST_PEOPLE = 10, 20
WITHIN, ACROSS = "within one group", "across two groups"


def measure_groups(groups: Groups, scores: Scores, units: Units, *, draws: int, seed: int = 0) -> GroupsDocument:
    """Measure the labelled and scored pairs of every group and pair of groups at the run's threshold.

    units: of all N pairs. draws: of people, 0 for no intervals but those of rates of 0 and 1.
    """
    pairs, rows = scores.labelled_pairs(), scores.labelled
    sample = GroupSample.of(groups, pairs, rows, units)
    drawn = sample.draw(draws, seed)
    size = len(groups.names)
    lines = sample.lines(drawn, seed)
    return {
        "source": groups.source,
        "unit": units.kind,
        "missing": len(groups.missing),
        "missing_examples": list(groups.missing[:EXAMPLES]),
        "in_several": _in_several(groups, units),
        "limits": {"expected_errors": LEAST_ERRORS, "units": LEAST_PEOPLE},
        "groups": lines[:size],
        "within": lines[size],
        "across": lines[size + 1],
        "not_stated": lines[size + 2],
        "matrix": sample.matrix(drawn, seed),
        "differentials": dict(_differentials(sample, lines[:size], drawn)),
    }


def _in_several(groups: Groups, units: Units) -> int:
    """How many people or images are in several groups; pairs without images are neither."""
    if units.kind == "pairs":
        return 0
    sides = np.concatenate([units.a, units.b]), np.concatenate([groups.a, groups.b])
    stated = sides[1] >= 0
    keys = np.unique(sides[0][stated].astype(np.int64) * len(groups.names) + sides[1][stated])
    return int((np.bincount(keys // len(groups.names)) > 1).sum())


def shares(counts: np.ndarray) -> np.ndarray:
    """(..., 2) rates of (..., 2, 2) numbers of pairs by truth and wrongness; NaN without pairs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[..., 1] / counts.sum(axis=-1)


@dataclass(frozen=True)
class GroupSample:
    """M labelled and scored pairs.

    names: of the G groups. table: (G, G), the cell of each pair of groups. cell: (M,) int64, the cells of the
    pairs, the last one if a group is not stated. truth, wrong: (M,) integers 0 or 1. units: of the M pairs.
    """

    names: tuple[str, ...]
    table: np.ndarray
    cell: np.ndarray
    truth: np.ndarray
    wrong: np.ndarray
    units: Units

    @classmethod
    def of(cls, groups: Groups, pairs: MeasuredPairs, rows: np.ndarray, units: Units) -> GroupSample:
        """The scored ones of labelled pairs. rows: of the pairs among all N. units: of all N."""
        scored = pairs.scored
        rows, truth = rows[scored], pairs.truth[scored].astype(np.int64)
        wrong = (pairs.calls[scored] != (truth == 1)).astype(np.int64)
        return cls(groups.names, groups.table(), groups.cell_of_pairs()[rows], truth, wrong, units.subset(rows))

    @property
    def cells(self) -> int:
        """Pairs of groups, and one more for pairs whose group is not stated."""
        return len(self.names) * (len(self.names) + 1) // 2 + 1

    @cached_property
    def _codes(self) -> np.ndarray:
        return (self.cell * 2 + self.truth) * 2 + self.wrong

    def count(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(cells, 2, 2) float64: the pairs of each cell, by truth, right and wrong. weights: (M,)."""
        counts = np.bincount(self._codes, weights, self.cells * 4)
        return counts.astype(np.float64).reshape(self.cells, 2, 2)

    def draw(self, draws: int, seed: int) -> np.ndarray:
        """(draws, cells, 2, 2) float64: the weights of each draw of people; no draws of no pairs."""
        if not draws or not len(self.cell):
            return np.zeros((0, self.cells, 2, 2))
        return np.stack(each_draw(self.units, self.count, draws=draws, seed=seed))

    @property
    def line_of_cell(self) -> np.ndarray:
        """(cells,) int64: G + 1 for two groups, the group itself for one, G + 2 if not stated."""
        size = len(self.names)
        lines = np.full(self.cells, size + 1, np.int64)
        lines[np.diag(self.table)] = np.arange(size)
        lines[-1] = size + 2
        return lines

    def gather(self, counts: np.ndarray) -> np.ndarray:
        """(..., G + 3, 2, 2): counts of each group, within all groups, across two, not stated."""
        size = len(self.names)
        one = np.eye(size + 3)[self.line_of_cell]
        one[:, size] = one[:, :size].sum(axis=1)
        return np.moveaxis(np.tensordot(counts, one, axes=([-3], [0])), -1, -3)

    def lines(self, drawn: np.ndarray, seed: int) -> list[GroupRow]:
        """A row for each group, one within all groups, one across two, one not stated."""
        size, line = len(self.names), self.line_of_cell[self.cell]
        counts, drawn = self.gather(self.count()), self.gather(drawn)
        within = np.where(line < size, size, line)
        # Once by group, once with all groups together.
        spans = self._spans(counts, drawn, line, seed, range(size))
        spans |= self._spans(counts, drawn, within, seed, range(size, size + 3))
        people = [self._people(each, size + 3) for each in (line, within)]
        names = (*self.names, WITHIN, ACROSS, NOT_STATED)
        rows = [
            _row(name, counts[at], people[at >= size][at], {kind: spans.get((at, kind)) for kind in (0, 1)})
            for at, name in enumerate(names)
        ]
        for at in range(size):
            rows[at]["too_small"] = dict(self._too_small(rows[at], counts[size]))
        return rows

    def _spans(
        self, counts: np.ndarray, drawn: np.ndarray, line: np.ndarray, seed: int, lines: range
    ) -> dict[tuple[int, int], tuple[Span, bool]]:
        """The intervals of some lines, by line and truth, and whether they are exact.

        line: (M,) the line of each pair, all pairs of `lines` among them.
        """
        rates, total = shares(drawn), counts.sum(axis=-1)
        flat = (counts[..., 1] == 0) | (counts[..., 1] == total)
        chosen = np.flatnonzero(flat[line, self.truth] & (line >= lines.start))
        kinds = line[chosen] * 2 + self.truth[chosen]
        disjoint = count_disjoint(
            self.units.a[chosen], self.units.b[chosen], kinds, 2 * len(counts), seed=seed
        ).reshape(-1, 2)
        spans: dict[tuple[int, int], tuple[Span, bool]] = {}
        for at in lines:
            for kind in (0, 1):
                exact = exact_span(counts[at, kind, 1], total[at, kind], int(disjoint[at, kind]))
                if span := exact or span_of(rates[:, at, kind]):
                    spans[at, kind] = (span, exact is not None)
        return spans

    def _people(self, line: np.ndarray, lines: int) -> np.ndarray:
        """(lines, 2) int64: how many units are in the pairs of each line, by truth."""
        kind = np.tile(line * 2 + self.truth, 2)
        keys = np.unique(np.concatenate([self.units.a, self.units.b]).astype(np.int64) * 2 * lines + kind)
        return np.bincount(keys % (2 * lines), minlength=2 * lines).reshape(lines, 2)

    def _too_small(self, row: GroupRow, within: np.ndarray) -> Iterator[tuple[str, str]]:
        """Why a group is too small for a rate. within: (2, 2) counts of all groups, whose rates it is held to."""
        for truth, (rate, kind) in enumerate(zip(RATES, KINDS, strict=True)):
            pairs, units = row[kind], row["units"][rate]  # type: ignore[literal-required]
            expected = pairs * within[truth, 1] / max(within[truth].sum(), 1)
            if not pairs:
                yield rate, f"no {kind} pairs"
            elif units < LEAST_PEOPLE:
                yield rate, f"{units:,} {self.units.kind}, fewer than {LEAST_PEOPLE}"
            elif expected < LEAST_ERRORS:
                yield rate, f"{expected:.1f} errors expected of {pairs:,} pairs, fewer than {LEAST_ERRORS}"

    def matrix(self, drawn: np.ndarray, seed: int) -> GroupMatrix:
        """False match rates of different pairs by the groups of both people."""
        counts = self.count()
        spans = self._spans(counts, drawn, self.cell, seed, range(self.cells))
        ends = np.full((2, self.cells), np.nan)
        for (cell, truth), (span, _) in spans.items():
            if truth:
                ends[:, cell] = span
        whole = counts.astype(np.int64)[:, 1]
        return {
            "pairs": whole.sum(axis=-1)[self.table].tolist(),
            "false_matches": whole[..., 1][self.table].tolist(),
            "fmr": shares(counts)[..., 1][self.table].tolist(),
            "low": ends[0][self.table].tolist(),
            "high": ends[1][self.table].tolist(),
        }


def _row(name: str, counts: np.ndarray, units: np.ndarray, spans: dict[int, tuple[Span, bool] | None]) -> GroupRow:
    """A row without `too_small`. counts: (2, 2) by truth and wrongness. units, spans: by truth."""
    (same, different), (rejected, accepted) = counts.sum(axis=-1), counts[:, 1]
    fnmr, fmr = shares(counts).tolist()
    known = {RATES[truth]: span for truth, span in spans.items() if span is not None}
    return {
        "group": name,
        "same": int(same),
        "different": int(different),
        "false_non_matches": int(rejected),
        "false_matches": int(accepted),
        "fnmr": fnmr,
        "fmr": fmr,
        "units": dict(zip(RATES, units.tolist(), strict=True)),
        "intervals": {rate: span for rate, (span, _) in known.items()},
        "exact": [rate for rate, (_, exact) in known.items() if exact],
        "too_small": {},
    }


def _differentials(
    sample: GroupSample, rows: list[GroupRow], drawn: np.ndarray
) -> Iterator[tuple[str, dict[str, Differentials]]]:
    """The measures by rate: of all groups that have pairs, and of those that are large enough."""
    rates = shares(sample.gather(drawn))
    for truth, rate in enumerate(RATES):
        observed = np.array([row[rate] for row in rows])  # type: ignore[literal-required]
        highest = np.array([row["intervals"].get(rate, (0.0, 1.0))[1] for row in rows])
        chosen = {
            "all": np.flatnonzero(~np.isnan(observed)),
            "large_enough": np.array([at for at, row in enumerate(rows) if rate not in row["too_small"]], np.int64),
        }
        yield (
            rate,
            {
                name: measure_differentials(
                    [rows[at]["group"] for at in among],
                    observed[among],
                    highest[among],
                    rates[:, among, truth],
                )
                for name, among in chosen.items()
            },
        )
