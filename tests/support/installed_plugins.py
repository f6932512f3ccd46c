"""An installed package that names backbones, as pip would leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install_plugins(folder: Path, objects: Mapping[str, str]) -> None:
    """Make a folder of `sys.path` hold a package's description. objects: `module:name` by the backbone's name."""
    about = folder / "faces_of_others-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faces-of-others\nVersion: 1.0\n")
    points = [f"{name} = {where}" for name, where in objects.items()]
    (about / "entry_points.txt").write_text("\n".join(["[batchverify.backbones]", *points]))
