"""Score a manifest on the cluster that runs this: `ray job submit … -- python jobs/score_job.py`."""

from pathlib import Path

import batchverify

SAMPLES = Path(__file__).resolve().parent.parent / "sample_manifests"

# Edit these. On a cluster, use an object store (s3://bucket/pairs.csv) or a folder that all nodes mount.
MANIFEST = SAMPLES / "faces.csv"
IMAGE_ROOT = None  # where relative paths start; None: the manifest's folder
OUTPUT = Path.cwd() / "scores.parquet"
CACHE = None  # None: $BATCHVERIFY_CACHE, else the user's cache folder

if __name__ == "__main__":
    summary = batchverify.score(MANIFEST, OUTPUT, image_root=IMAGE_ROOT, cache=CACHE)
    print(f"{OUTPUT}: {summary.scored:,} of {summary.rows:,} pairs scored in {summary.seconds:g} s")
