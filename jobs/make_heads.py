"""Train the shipped heads on LFW View 1: `python jobs/make_heads.py FOLDER_OF_PREPARE_LFW [FILE] [BACKBONE]`.

It trains with the default settings of `batchverify train`, once for each shipped backbone and setting. FILE: the
published weights. BACKBONE: the only one to train heads for; `vggface2+compact` for that of both together.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from batchverify.heads.fused_head import FusedHead, fused_head_name
from batchverify.heads.head import Head, default_head_name
from batchverify.training.train import train

SHIPPED = Path(__file__).resolve().parent.parent / "batchverify" / "heads" / "weights"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"crop": "detect"},
    {"crop": "detect", "tta": "flip"},
    {"crop": "center"},
    {"crop": "none"},
)
OWN: tuple[dict[str, Any], ...] = ({}, {"tta": "flip"})
BACKBONES = {"vggface2": SETTINGS, "vggface2-float": SETTINGS, "compact": OWN, "vggface2+compact": OWN}


def main(folder: Path, weights: str | None, backbones: list[str]) -> None:
    """Write one head for each setting into the package and print its figures."""
    for backbone in backbones:
        for settings in BACKBONES[backbone]:
            with tempfile.TemporaryDirectory() as scratch:
                made = Path(scratch) / "head.safetensors"
                train(
                    folder / "train.csv",
                    folder / "dev.csv",
                    made,
                    backbone=backbone,
                    weights=weights if backbone == "vggface2-float" else None,
                    quiet=True,
                    **settings,
                )
                fused = "+" in backbone
                head = FusedHead.load(made) if fused else Head.load(made)
                name = fused_head_name if fused else default_head_name
                target = SHIPPED / name(head.embedding)
                target.write_bytes(made.read_bytes())
            held = head.about["held_out"]
            print(f"{backbone} {settings}: {target.name} AUC {held['auc']:.5f} F1 {held['f1']:.4f}", flush=True)


if __name__ == "__main__":
    given = sys.argv[2:]
    file = next((name for name in given if name not in BACKBONES), None)
    main(Path(sys.argv[1]), file, [name for name in given if name in BACKBONES] or list(BACKBONES))
