"""What a run did: counts for the run record, a table for people, the rows for Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchverify.process import peak_memory
from batchverify.progress import Progress, duration

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class EmbedSummary:
    """What happened to the images of a manifest.

    unique_images = embedded + cached + repeated (other paths with the same bytes) + failed + resumed (those of
    rows that an earlier run finished, not looked at again).
    failures: images by reason. stage_seconds: of all workers together; `start` is building the embedder (its
    weights are packed in the first `embed`), `wait` is what workers that detect and embed had nothing to do.
    embedder_busy: the share of their time that they had. compute_reason: why this compute path. image_seconds: by the
    clock, until the fate of every image was known. peak_memory_mb: of the `driver`, and with Ray of the hungriest of
    its `workers`.
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

    @staticmethod
    def counts(progress: Progress, workers: int) -> dict[str, Any]:
        """The fields that a run's progress knows. workers: that detect and embed, side by side."""
        stages = dict(progress.watch.seconds)
        busy = stages.get("detect", 0.0) + stages.get("embed", 0.0)
        available = progress.image_seconds * workers
        if progress.embedded:
            stages["wait"] = max(available - busy, 0.0)
        rate = progress.embedded / progress.image_seconds if progress.embedded else 0.0
        return {
            "embedded": progress.embedded,
            "cached": progress.cached,
            "repeated": progress.repeated,
            "images_per_second": round(rate, 1),
            "stage_seconds": {name: round(each, 3) for name, each in stages.items()},
            "image_seconds": round(progress.image_seconds, 3),
            "embedder_busy": round(min(busy / available, 1.0), 3) if progress.embedded else 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, for `--json` and the run record."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def lines(self) -> list[tuple[str, str]]:
        """The table for people: names and values."""
        lines = [
            ("pairs", f"{self.rows:,}"),
            ("unique images", f"{self.unique_images:,} for {2 * self.rows:,} references"),
            ("embedded", f"{self.embedded:,}{self._rate()}"),
            ("from the cache", f"{self.cached:,}"),
        ]
        if self.repeated:
            lines.append(("same bytes twice", f"{self.repeated:,}"))
        if self.failed:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.failures.items())
            lines.append(("images failed", f"{self.failed:,} ({reasons})"))
        if self.embedded:
            stages = ", ".join(f"{name} {each:.1f} s" for name, each in self.stage_seconds.items())
            lines.append(("computed", f"{self.compute_path} ({self.compute_reason})"))
            lines.append(("stages", f"{stages}; embedder busy {self.embedder_busy:.0%}"))
        if self.peak_memory_mb:
            peaks = ", ".join(f"{name} {each:,.0f} MB" for name, each in self.peak_memory_mb.items())
            lines.append(("most memory", peaks))
        lines.append(("time", f"{duration(self.seconds)}, engine {self.engine}"))
        return lines

    def _rate(self) -> str:
        return f"  ({self.images_per_second:.1f} images/s)" if self.embedded else ""


@dataclass(frozen=True)
class ScoreSummary(EmbedSummary):
    """What `score` did. scored + failed_rows = rows; different: rows labelled 1.

    resumed_rows: those that an earlier run had finished.
    """

    scored: int = 0
    failed_rows: int = 0
    different: int = 0
    resumed_rows: int = 0
    threshold: float = 0.5
    head: str = ""
    output: str | None = None
    _table: pa.Table | None = field(default=None, repr=False)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], seconds: float) -> ScoreSummary:
        """What a rerun did that found everything finished: the output's facts, and no work."""
        nothing = {"embedded": 0, "cached": 0, "repeated": 0, "images_per_second": 0.0, "embedder_busy": 0.0}
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        return cls(
            **{
                **known,
                **nothing,
                "stage_seconds": {},
                "image_seconds": 0.0,
                "peak_memory_mb": {"driver": round(peak_memory(), 1)},
                "resumed": record["unique_images"] - record["failed"],
                "resumed_rows": record["rows"],
                "seconds": round(seconds, 2),
            }
        )

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
        """The output's rows as a DataFrame."""
        return self.to_arrow().to_pandas()

    def lines(self) -> list[tuple[str, str]]:
        """The table for people."""
        lines = super().lines()
        share = self.scored / self.rows if self.rows else 0.0
        verdicts = f"{self.scored - self.different:,} same, {self.different:,} different"
        lines.insert(1, ("scored", f"{self.scored:,} ({share:.1%}): {verdicts}"))
        if self.failed_rows:
            lines.insert(2, ("not scored", f"{self.failed_rows:,}; column `status` says why"))
        if self.resumed_rows:
            lines.insert(1, ("done before", f"{self.resumed_rows:,} pairs, not touched again"))
        lines.append(("threshold", f"{self.threshold:.4f}"))
        if self.output:
            lines.append(("written to", self.output))
        return lines
