"""View 1 of LFW end to end, for each shipped setting: `python benchmarks/lfw.py ROOT [--append]`.

Prepares the manifests, scores the 1,000 test pairs and prints accuracy; `--append` adds the table to RESULTS.md.
"""

import sys
import tempfile
from datetime import date
from pathlib import Path

import batchverify
from batchverify.datasets import prepare_lfw
from batchverify.metrics import measure

SETTINGS = ({"crop": "detect"}, {"crop": "detect", "tta": "flip"}, {"crop": "center"}, {"crop": "none"})
HEADER = (
    "| setting | AUC | F1 at the shipped threshold | best possible F1 | accuracy | Brier | embedded | images/s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def table_row(manifest: Path, settings: dict[str, str]) -> str:
    """Score the test manifest without a cache and measure."""
    summary = batchverify.score(manifest, **settings, no_cache=True, engine="local")
    frame = summary.to_pandas().dropna(subset=["probability"])
    got = measure(frame["true_label"].to_numpy(), frame["probability"].to_numpy(), summary.threshold)
    name = ", ".join(settings.values())
    return (
        f"| {name} | {got.auc:.5f} | {got.f1:.4f} | {got.best_f1:.4f} | {got.accuracy:.4f} | {got.brier:.4f} "
        f"| {summary.embedded:,} for {2 * summary.rows:,} references | {summary.images_per_second:.1f} |"
    )


def machine() -> str:
    """The CPU's name and the number of CPUs in use."""
    from batchverify.engine import available_cpus

    lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {available_cpus()} CPUs"


def main(root: Path, append: bool) -> None:
    """Print the table; with `append`, keep it."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_lfw(root, Path(folder))
        rows = [table_row(Path(folder) / "test.csv", settings) for settings in SETTINGS]
    table = "\n".join([HEADER, *rows])
    print(table)
    if append:
        title = f"\n## LFW View 1 test, {date.today()}, {machine()}, `python benchmarks/lfw.py ROOT`\n\n"
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf8") as file:
            file.write(title + table + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--append" in sys.argv)
