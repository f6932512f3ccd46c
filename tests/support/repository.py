"""Where the repository and these helpers lie."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPOSITORY = SUPPORT.parent.parent
PACKAGE = REPOSITORY / "batchverify"
