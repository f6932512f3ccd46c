"""Train a head on the cluster that runs this: `ray job submit … -- python jobs/train_job.py`."""

import batchverify

# Edit these. On a cluster, use an object store (s3://bucket/train.csv) or a folder that all nodes mount.
TRAIN = "train.csv"
DEV = "dev.csv"  # pairs of other people
HEAD = "head.safetensors"
ALGORITHMS = ("distance",)  # several: an ensemble
CACHE = None  # None: $BATCHVERIFY_CACHE, else the user's cache folder

if __name__ == "__main__":
    summary = batchverify.train(TRAIN, DEV, HEAD, algorithms=ALGORITHMS, cache=CACHE)
    print(f"{HEAD}: {summary.embedded:,} images embedded, trained in {summary.seconds:g} s")
