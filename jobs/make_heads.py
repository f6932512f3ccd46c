"""Train the shipped heads on LFW View 1: `python jobs/make_heads.py FOLDER_OF_PREPARE_LFW [--weights FILE]`.

It trains with the default settings of `batchverify train`, once for each shipped backbone and setting.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from batchverify.heads.head import Head, default_head_name
from batchverify.training.train import train

SHIPPED = Path(__file__).resolve().parent.parent / "batchverify" / "heads" / "weights"
BACKBONES = ("vggface2", "vggface2-float")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"crop": "detect"},
    {"crop": "detect", "tta": "flip"},
    {"crop": "center"},
    {"crop": "none"},
)


def main(folder: Path, weights: str | None) -> None:
    """Write one head for each setting into the package and print its figures."""
    for backbone in BACKBONES:
        for settings in SETTINGS:
            with tempfile.TemporaryDirectory() as scratch:
                made = Path(scratch) / "head.safetensors"
                train(
                    folder / "train.csv",
                    folder / "dev.csv",
                    made,
                    backbone=backbone,
                    weights=weights if backbone != "vggface2" else None,
                    quiet=True,
                    **settings,
                )
                head = Head.load(made)
                target = SHIPPED / default_head_name(head.embedding)
                target.write_bytes(made.read_bytes())
            held = head.about["held_out"]
            print(
                f"{backbone} {settings}: {target.name} AUC {held['auc']:.5f} F1 {held['f1']:.4f}", flush=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3] if sys.argv[2:3] == ["--weights"] else None)
