"""Summaries of runs: counts for the run record, a table for people, rows for Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchverify.errors import UsageError
from batchverify.process import peak_memory
from batchverify.progress import duration
from batchverify.runtime.compute_path import shown_members

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class EmbedSummary:
    """What happened to the images of a manifest.

    unique_images = embedded + cached + repeated (other paths with the same bytes) + failed + resumed (images of
    rows that an earlier run finished, not looked at again). failures: images by reason. stage_seconds: of all
    workers together; `start` is building the embedder (its weights are packed in the first `embed`), `wait` is the
    idle time of workers that detect and embed. embedder_busy: the share of time in which those were not idle.
    compute_reason: why this compute path was chosen. image_seconds: wall-clock time until every image was done.
    peak_memory_mb: of the `driver` and, with Ray, the highest of its `workers`. backbones: if there are several, the
    counts of each by its name; the counts above are then sums, in which an image counts once for each, and
    `images_per_second` is the rate through all of them.
    """

    rows: int
    unique_images: int
    embedded: int
    cached: int
    repeated: int
    failed: int
    failures: Mapping[str, int]
    seconds: float
    images_per_second: float
    engine: str
    compute_path: str
    cache: str | None
    stage_seconds: Mapping[str, float]
    embedder_busy: float
    compute_reason: str = ""
    resumed: int = 0
    image_seconds: float = 0.0
    peak_memory_mb: Mapping[str, float] = field(default_factory=dict)
    backbones: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All figures, for `--json` and the run record; `backbones`, `review` and `prior` only if there are any."""
        hidden = [name for name in ("backbones", "review", "prior") if not getattr(self, name, None)]
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in hidden}

    def of_backbone(self) -> dict[str, Any]:
        """The entry of `backbones` for the one that this is the summary of."""
        counts = ("embedded", "cached", "repeated", "failed", "resumed", "failures")
        return {name: getattr(self, name) for name in (*counts, "compute_path", "image_seconds", "engine")}

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        rate = f"  ({self.images_per_second:.1f} images/s)" if self.embedded else ""
        lines = [
            ("pairs", f"{self.rows:,}"),
            ("unique images", f"{self.unique_images:,} for {2 * self.rows:,} image paths"),
            ("embedded", f"{self.embedded:,}{rate}"),
            ("from the cache", f"{self.cached:,}"),
        ]
        if self.repeated:
            lines.append(("same bytes", f"{self.repeated:,}"))
        if self.failed:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.failures.items())
            lines.append(("images failed", f"{self.failed:,} ({reasons})"))
        for name, counts in self.backbones.items():
            each = ", ".join(f"{what} {counts[what]:,}" for what in ("embedded", "cached", "failed"))
            lines.append((f"  {name}", each))
        if self.embedded:
            stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stage_seconds.items())
            path, reason = shown_members(self.compute_path), shown_members(self.compute_reason)
            lines.append(("computed", f"{path} ({reason})"))
            lines.append(("stages", f"{stages}; embedder busy {self.embedder_busy:.0%}"))
        if self.peak_memory_mb:
            peaks = ", ".join(f"{name} {peak:,.0f} MB" for name, peak in self.peak_memory_mb.items())
            lines.append(("peak memory", peaks))
        lines.append(("time", f"{duration(self.seconds)}, engine {self.engine}"))
        return lines


@dataclass(frozen=True)
class ScoreSummary(EmbedSummary):
    """What `score` did.

    rows = scored + failed_rows. different: rows labelled 1. resumed_rows: rows that an earlier run had finished.
    review: with `--review`, its rates and thresholds, and the rows with each verdict.
    threshold: for the probabilities as they are written. prior: with `--prior`, the `share` of same pairs that they
    are for, its `source` and, if that is `estimated`, the 95 % `interval`.
    """

    scored: int = 0
    failed_rows: int = 0
    different: int = 0
    resumed_rows: int = 0
    threshold: float = 0.5
    head: str = ""
    output: str | None = None
    review: Mapping[str, Any] | None = None
    prior: Mapping[str, Any] | None = None
    _table: pa.Table | None = field(default=None, repr=False)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], seconds: float) -> ScoreSummary:
        """The summary of a rerun that found the output finished: the figures of its run record, and no work."""
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        no_work: dict[str, Any] = {
            **dict.fromkeys(("embedded", "cached", "repeated"), 0),
            **dict.fromkeys(("images_per_second", "embedder_busy", "image_seconds"), 0.0),
            "resumed": record["unique_images"] * max(1, len(record.get("backbones") or {})) - record["failed"],
            "backbones": {},
            "resumed_rows": record["rows"],
            "stage_seconds": {},
            "seconds": round(seconds, 2),
            "peak_memory_mb": {"driver": round(peak_memory(), 1)},
        }
        return cls(**{**known, **no_work})

    def to_arrow(self) -> pa.Table:
        """The output's rows, in the manifest's order."""
        if self._table is not None:
            return self._table
        if self.output is None:
            raise ValueError("this summary has neither rows nor an output file")
        import pyarrow.dataset as pads  # which imports pandas

        from batchverify.scoring.parquet import part_files
        from batchverify.storage.location import Location

        location = Location.parse(self.output)
        parts = part_files(location) if location.kind() == "folder" else [location]
        paths = [part.path for part in parts]
        return pads.dataset(paths, filesystem=location.filesystem, format="parquet").to_table()

    def to_pandas(self) -> pd.DataFrame:
        """The output's rows as a DataFrame; `UsageError` for columns that pandas has no type for, such as unions."""
        try:
            return self.to_arrow().to_pandas()
        except pa.ArrowException as exc:
            raise UsageError(f"the rows do not fit into a DataFrame: {exc}; take `to_arrow()`") from exc

    def lines(self) -> list[tuple[str, str]]:
        """The table for people."""
        lines = super().lines()
        share = self.scored / self.rows if self.rows else 0.0
        verdicts = f"{self.scored - self.different:,} same, {self.different:,} different"
        lines.insert(1, ("scored", f"{self.scored:,} ({share:.1%}): {verdicts}"))
        if self.failed_rows:
            lines.insert(2, ("not scored", f"{self.failed_rows:,}; see column `status`"))
        if self.resumed_rows:
            lines.insert(1, ("done earlier", f"{self.resumed_rows:,} pairs, not scored again"))
        if self.prior:
            lines.append(("share of same pairs", shown_prior(self.prior)))
        lines.append(("threshold", f"{self.threshold:.4f}"))
        if self.review is not None:
            lines.append(("verdicts", shown_review(self.review, self.scored)))
        if self.output:
            lines.append(("written to", self.output))
        return lines


def shown_review(review: Mapping[str, Any], scored: int) -> str:
    """The verdicts of `--review` and its thresholds, for people. scored: rows with a verdict."""
    share = review["review"] / scored if scored else 0.0
    return (
        f"{review['same']:,} same (below {review['same_below']:.4f}), {review['different']:,} different (from "
        f"{review['different_from']:.4f}), {review['review']:,} for review ({share:.1%})"
    )


def shown_prior(prior: Mapping[str, Any]) -> str:
    """A share of same pairs for people, with its interval if it was estimated."""
    text = f"{prior['share']:.4f}, {prior['source']}"
    if interval := prior.get("interval"):
        text += f" from {prior['pairs']:,} pairs (95 % interval {interval[0]:.4f} to {interval[1]:.4f})"
        if (drift := prior["drift"])["verdict"] == "not checked":
            text += f"; drift not checked: {drift['reason']}"
    return text
