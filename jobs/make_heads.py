"""Fit the shipped heads on LFW View 1: `python jobs/make_heads.py FOLDER_OF_PREPARE_LFW [--weights FILE]`."""

import sys
from pathlib import Path
from typing import Any

from batchverify.backbones import packaged_weights
from batchverify.head import Head, default_head_name
from batchverify.options import EmbedOptions
from batchverify.training import LabelledPairs, fit_head
from batchverify.workflows import embed_gallery

BACKBONES = ("vggface2", "vggface2-float")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"crop": "detect"},
    {"crop": "detect", "tta": "flip"},
    {"crop": "center"},
    {"crop": "none"},
)


def make_head(folder: Path, options: EmbedOptions) -> Head:
    """Fit the head of one setting on train.csv, its thresholds from dev.csv."""
    sets = []
    for name in ("train.csv", "dev.csv"):
        job, gallery = embed_gallery(folder / name, options)
        sets.append((job, gallery, LabelledPairs.collect(job.manifest.blocks(job.scan), gallery)))
    (train, images, pairs), (_, dev_images, dev_pairs) = sets
    about = {
        "data": "LFW View 1, train.csv and dev.csv of `batchverify prepare lfw`",
        "training": {"manifest_fingerprint": train.manifest_fingerprint, "left_out": pairs.left_out},
    }
    dev, strangers = dev_pairs.vectors(dev_images), dev_pairs.strangers(dev_images)
    return fit_head(pairs.vectors(images), dev, strangers, train.fingerprint, about)


def main(folder: Path, weights: str | None) -> None:
    """Write one head a setting into the package and print its dev figures."""
    for backbone in BACKBONES:
        for changes in SETTINGS:
            options = EmbedOptions(
                backbone=backbone, weights=weights if backbone != "vggface2" else None, **changes
            )
            head = make_head(folder, options)
            target = packaged_weights().with_name(default_head_name(head.embedding))
            target.write_bytes(head.to_bytes())
            dev = head.about["dev"]
            print(
                f"{backbone} {changes}: {target.name} dev AUC {dev['auc']:.5f} F1 {dev['f1']:.4f}", flush=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3] if sys.argv[2:3] == ["--weights"] else None)
