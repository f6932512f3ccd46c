"""The house's rules: rooms import downwards alone, heavy libraries stay in theirs, files hold one noun."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from repository import PACKAGE

# From the top down: a room imports the rooms after it, and the shared words at the top of the package.
ROOMS = (
    *("cli", "training", "evaluation", "scoring", "engine", "embedding", "heads"),
    *("cache", "faces", "manifest", "runtime", "kernels", "storage"),
)
# By the start of a module's path.
HEAVY = {
    "click": ("cli",),
    "ray": ("engine.ray", "training.finetuning.distributed", "training.tune"),
    "torch": (
        "embedding",
        "engine.base",
        "faces.mtcnn_torch",
        "faces.retinaface_torch",
        "heads",
        "runtime.devices",
        "training",
    ),
    "openvino": (
        "embedding.cpu_network",
        "embedding.onnx_backbone",
        "faces.mtcnn",
        "faces.retinaface_network",
        "runtime.compiled_network",
    ),
    "facenet_pytorch": (),
    "numba": ("kernels.numba_loops",),
    "sklearn": (),
    "scipy": ("evaluation",),
    "jinja2": ("evaluation.report",),
    "plotly": ("evaluation.report",),
    "pandas": ("scoring.summary",),
}
# Imported for annotations: a stage names the type of the object that it is handed.
TYPES_ALONE = {("scoring.summary", "pandas")}
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 550, 60, 10
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """A module's path in the package: `engine.ray.cluster`, `errors`, `` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree, parsed once for all rules."""
    return ast.parse(path.read_text(encoding="utf8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere in it, as `batchverify.x.y` for its own package's."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = str(node.module)
            inner = module.partition(".")[2].replace(".", "/")
            is_room = module.startswith("batchverify") and (PACKAGE / inner).is_dir()
            names |= {f"{module}.{each.name}" for each in node.names} if is_room else {module}
    return frozenset(names)


def modules() -> dict[str, set[str]]:
    """The package's modules by name, each with those of the package that it imports."""
    graph = {}
    for path in FILES:
        own = {each.partition(".")[2] for each in imported(path) if each.partition(".")[0] == "batchverify"}
        graph[name_of(path)] = own
    return graph


def test_there_is_a_house():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ROOMS)
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10
    assert len(FILES) > 80


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_import_downwards_alone(path):
    room, has_room, _ = name_of(path).partition(".")
    if name_of(path) == "" or path.name == "__init__.py":
        assert not imported(path) - {"batchverify.version"} or name_of(path) == ""
        return
    for name in imported(path):
        top, _, rest = name.partition(".")
        below = rest.partition(".")[0]
        if top != "batchverify" or below not in ROOMS or below == room:
            continue
        assert has_room, f"the shared word {room} imports {rest}"
        assert ROOMS.index(below) > ROOMS.index(room), f"{room} imports {rest}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_stay_in_their_rooms(path):
    for name in imported(path):
        library = name.partition(".")[0]
        allowed = HEAVY.get(library)
        assert allowed is None or name_of(path).startswith(allowed), f"{name_of(path)} imports {name}"


def test_no_import_goes_round_in_a_circle():
    graph = modules()
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                follow(other, (*way, name))
            done.add(name)

    for name in graph:
        if name:
            follow(name, ())
    assert len(done) > 80


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short_and_say_what_they_are_for(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    assert len(path.read_text(encoding="utf8").splitlines()) <= LONGEST_FILE
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert len(tree.body) == 1, "a room's __init__ is one docstring"
    for node in functions(tree):
        assert length(node) < LONGEST_FUNCTION, f"{path}: {node.name}"


def test_half_of_all_functions_are_short():
    lengths = sorted(length(node) for path in FILES for node in functions(tree_of(path)))
    assert lengths[len(lengths) // 2] <= MEDIAN_FUNCTION


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a module, methods and inner ones, too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


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
