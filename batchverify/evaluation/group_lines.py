"""The lines on the terminal about groups of people and about discarding pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchverify.evaluation.bootstrap import shown_span
from batchverify.evaluation.document import Differentials, Discards, GroupRow, GroupsDocument

TITLES = {"fmr": "FMR", "fnmr": "FNMR"}
# The groups named in a line.
NAMED = 5
# The shares of pairs discarded that a line shows.
SHOWN = (0.0, 0.1, 0.2)


def group_lines(groups: GroupsDocument | None) -> Iterator[tuple[str, str]]:
    """What the table on the terminal says of groups: nothing without any."""
    if groups is None:
        return
    rows = groups["groups"]
    yield "groups", f"{len(rows)} from {groups['source']}"
    if groups["missing"]:
        more = ", …" if groups["missing"] > len(groups["missing_examples"]) else ""
        names = ", ".join(groups["missing_examples"]) + more
        yield "people not in it", f"{groups['missing']:,}, counted as not stated: {names}"
    row = groups["not_stated"]
    if row["same"] or row["different"]:
        yield "group not stated", f"{row['same']:,} same, {row['different']:,} different pairs"
    for rate, title in TITLES.items():
        small = [f"{row['group']}: {row['too_small'][rate]}" for row in rows if rate in row["too_small"]]
        if small:
            more = f"; and {len(small) - NAMED} more" if len(small) > NAMED else ""
            yield f"too small for {title}", "; ".join(small[:NAMED]) + more
        yield (
            title,
            f"within one group {_rate(groups['within'], rate)}, across {_rate(groups['across'], rate)}",
        )
        large, every = (groups["differentials"][rate][name] for name in ("large_enough", "all"))
        compared = len(large["groups"])
        among = ", all too small" if large["reason"] else f", of {compared} groups" * (compared < len(rows))
        yield from _measures(title, every if large["reason"] else large, among)


def _rate(row: GroupRow, rate: str) -> str:
    value = row[rate]  # type: ignore[literal-required]
    return "–" if value is None else f"{value:.5f}{shown_span(row['intervals'].get(rate), '.5f')}"


def _measures(title: str, found: Differentials, among: str) -> Iterator[tuple[str, str]]:
    if found["reason"]:
        yield f"{title} of groups", found["reason"]
        return
    for name, text in (("worst_over_gmean", "worst over geometric mean"), ("gini", "Gini coefficient")):
        each = found["measures"][name]
        least = f"at least {each['at_least']:.3f}" if each["at_least"] is not None else ""
        value = f"{each['value']:.3f}" if each["value"] is not None else ""
        chance = f", by chance up to {each['by_chance']:.3f}" if each["by_chance"] is not None else ""
        worst = f"; worst {found['worst']}, best {found['best']}{among}" if name != "gini" else ""
        shown = f"{', '.join(filter(None, (value, least)))}{shown_span(each['interval'], '.3f')}"
        yield f"{title}, {text}", f"{shown}{chance}{worst}"


def quality_lines(qualities: Sequence[Discards]) -> Iterator[tuple[str, str]]:
    """What the table on the terminal says of each column of quality."""
    for each in qualities:
        name, way = each["column"], "above" if each["bad"] == "high" else "below"
        if not each["pairs"] or each["fnmr"][0] is None:
            yield f"discards by {name}", "no labelled and scored same pair has a quality"
            continue
        points = [(share, each["fnmr"][each["shares"].index(share)]) for share in SHOWN]
        curve = ", ".join(f"{value:.5f} at {share:.0%}" for share, value in points if value is not None)
        apart = f"; {each['without']:,} pairs have none" if each["without"] else ""
        yield f"FNMR, discards by {name}", f"{curve}{apart}"
        if each["area_over_random"] is not None:
            span = shown_span(each["area_interval"], ".3f")
            yield "", f"area {each['area_over_random']:.3f}{span} of that of a quality that says nothing"
        for row in each["wanted"]:
            if row["share"] is None:
                # Lower rates need more discards and more pairs.
                yield f"for FNMR {row['fnmr']:g} and below", str(row["reason"])
                break
            cut = f", {name} {way} {row['cut']:.6g}" if row["cut"] is not None else ""
            yield (
                f"for FNMR {row['fnmr']:g}",
                f"discard {row['share']:.0%}{shown_span(row['interval'], '.0%')}{cut}",
            )
