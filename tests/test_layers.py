"""The house's rules: imports go strictly down, heavy libraries stay where they belong, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from repository import PACKAGE

# From the top down: a module imports from lines below its own alone.
TABLE = """
__init__ cli
cli_train cli_cache cli_prepare cli_submit cli_evaluate
train_workflow cli_output evaluation
workflows cli_options comparison report_pairs review
scoring
launch output
prediction tuning scheduler pair_run checking cache_care job parts slices drift truth plots examples
scores report
ray_engine summary train_summary planning submit score_files folds evaluation_summary report_record
crew sharing
cluster
sinks jobfolder thumbnails
engine training training_log
results recipe
pipeline linear network leakage
perceptron
cache embedder labelled head measured
gallery manifest member
unique_images
spelling cpu_network forward
backbones crops decoding detection images segments tables columns options
fingerprint locations downloads datasets calibration progress cache_report pairs features
augmentation metrics newton moments mtcnn_torch curve bootstrap bounds
mtcnn stores distances inception
pyramid devices
kernels openvino_runtime
ahead errors records version stopwatch memory plain_kernels numba_kernels owners text_numbers
"""
LEVELS = {name: -level for level, line in enumerate(TABLE.strip().splitlines()) for name in line.split()}
HEAVY = {
    "click": {
        "cli",
        "cli_cache",
        "cli_evaluate",
        "cli_options",
        "cli_output",
        "cli_prepare",
        "cli_submit",
        "cli_train",
    },
    "ray": {"cluster", "crew", "ray_engine", "sharing", "submit", "tuning"},
    "torch": {
        "devices",
        "engine",
        "features",
        "forward",
        "head",
        "labelled",
        "linear",
        "member",
        "moments",
        "mtcnn_torch",
        "network",
        "newton",
        "perceptron",
        "recipe",
        "training",
        "training_log",
        "tuning",
    },
    "openvino": {"cpu_network", "mtcnn", "openvino_runtime"},
    "sklearn": {"metrics"},
    "numba": {"numba_kernels"},
    "scipy": {"drift", "slices"},
    "jinja2": {"report"},
    "plotly": {"report"},
    "pandas": {"summary"},
}
# Imported for annotations: a stage names the type of the object that it is handed.
TYPES_ALONE = {("pipeline", "embedder")}
MODULES = sorted(PACKAGE.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, `batchverify.x` for its own package's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            own = node.module == "batchverify"
            names |= {f"{node.module}.{each.name}" for each in node.names} if own else {str(node.module)}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_strictly_down(path):
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "batchverify" and (path.stem, rest) not in TYPES_ALONE:
            assert LEVELS[rest] < LEVELS[path.stem], f"{path.stem} imports {rest}"
        assert path.stem in HEAVY.get(top, {path.stem}), f"{path.stem} imports {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_files_and_functions_are_short_and_say_what_they_are_for(path):
    tree = ast.parse(path.read_text(encoding="utf8"))
    assert ast.get_docstring(tree)
    assert len(path.read_text(encoding="utf8").splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.stem}: {node.name}"


@pytest.mark.parametrize("start", ["import batchverify", "batchverify --help"])
def test_a_start_loads_nothing_heavy(start):
    if start == "batchverify --help":
        start = "from batchverify.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    seen = "import sys; sys.stderr.write(' '.join({'torch', 'ray', 'pandas', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{seen}"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("Usage:") == ("help" in start)
