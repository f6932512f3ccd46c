"""Fuzzes one reader with atheris: `python tests/fuzz/fuzz.py image -max_total_time=300`.

The name of a target and options of libFuzzer, such as `-runs=100000`, `-seed=1`, or a file to run once more. What
breaks a promise, hangs for ten seconds or takes more than 3 GB ends the run with another exit code than 0, and the
input is kept where `-artifact_prefix` says, by default here.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem.removesuffix("_target") for path in HERE.glob("*_target.py"))
LIMITS = ("-timeout=10", "-rss_limit_mb=3000", "-max_len=20000")


def main(arguments: list[str]) -> None:
    """Fuzz the target that the first argument names."""
    if not arguments or arguments[0] not in NAMES:
        sys.exit(f"usage: fuzz.py {{{','.join(NAMES)}}} [options of libFuzzer] [files]")
    name, *options = arguments
    sys.path.append(str(HERE.parent / "support"))
    # A damaged file is no event here.
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        with atheris.instrument_imports(include=["batchverify", "PIL"]):
            target = import_module(f"{name}_target").TARGET(Path(folder))
        warnings.simplefilter("ignore")
        if not any(Path(option).exists() for option in options):
            options.append(_corpus(Path(folder) / "corpus", target.seeds()))
        atheris.Setup([sys.argv[0], *LIMITS, *options], target.run)
        atheris.Fuzz()


def _corpus(folder: Path, seeds: list[bytes]) -> str:
    folder.mkdir()
    for number, seed in enumerate(seeds):
        (folder / f"{number:03d}").write_bytes(seed)
    return str(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
