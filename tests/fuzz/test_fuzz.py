"""A fixed number of fuzzed inputs for every reader of files that others write; more with `BATCHVERIFY_FUZZ_RUNS`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

pytest.importorskip("atheris", reason="atheris has wheels for some Pythons on Linux alone")
FUZZ = REPOSITORY / "tests" / "fuzz"
TARGETS = sorted(path.stem.removesuffix("_target") for path in FUZZ.glob("*_target.py"))
RUNS = int(os.environ.get("BATCHVERIFY_FUZZ_RUNS", "1000"))


@pytest.mark.timeout(0 if RUNS > 1000 else 300)
@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_give_a_value_or_a_documented_error(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ / "fuzz.py"), target, f"-runs={RUNS}", "-seed=1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    kept = [path.name for path in tmp_path.iterdir() if path.is_file()]
    assert done.returncode == 0, f"{kept} in {tmp_path}\n{(done.stdout + done.stderr)[-4000:]}"
    # It counts a few more where inputs were tried again.
    count = re.search(r"Done (\d+) runs", done.stderr)
    assert count and int(count[1]) >= RUNS, done.stderr[-1000:]


def test_a_broken_promise_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "broken_target.py").write_text(
        "class TARGET:\n"
        "    def __init__(self, folder): pass\n"
        "    def seeds(self): return [b'aaaa']\n"
        "    def run(self, data):\n"
        "        if len(data) > 2: raise TypeError('broken')\n"
    )
    (tmp_path / "fuzz.py").write_text((FUZZ / "fuzz.py").read_text())
    done = subprocess.run(
        [sys.executable, str(tmp_path / "fuzz.py"), "broken", "-runs=1000"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, 1), done.stderr
    assert "TypeError: broken" in done.stdout + done.stderr
    assert [path for path in tmp_path.iterdir() if path.name.startswith("crash-")]
