"""The documents say what the program says, their links lead somewhere, and their code runs."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys

import click
import pytest
from repository import PACKAGE, REPOSITORY

import batchverify
from batchverify.cli.app import main

DOCS = REPOSITORY / "docs"
README = (REPOSITORY / "README.md").read_text(encoding="utf8")
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "SECURITY.md", "benchmarks/RESULTS.md")),
    PACKAGE / "embedding" / "weights" / "MODEL_CARD.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("*.ipynb")),
]
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(text):
    """The first code block below each heading of the second level."""
    return dict(re.findall(r"^## ([^\n]+)\n\n```text\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))


COMMANDS = sections((DOCS / "commands.md").read_text(encoding="utf8"))


def test_the_tree_shows_every_module():
    tree = (DOCS / "architecture.md").read_text(encoding="utf8").partition("## Rules")[0]
    shown = set(re.findall(r"\b\w+\.py\b", tree))
    assert {path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py"} == shown - {"__init__.py"}


def test_every_command_has_its_help_text():
    groups = {name for name, command in main.commands.items() if isinstance(command, click.Group)}
    nested = {f"{group} {name}" for group in groups for name in main.commands[group].commands}
    alone = {name for name in groups if main.commands[name].invoke_without_command}
    names = {f"batchverify {name}" for name in (set(main.commands) - groups) | alone | nested}
    assert set(COMMANDS) == {"batchverify", *names}


@pytest.mark.parametrize(("command", "text"), COMMANDS.items(), ids=list(COMMANDS))
def test_help_texts_are_the_real_ones(command, text):
    assert text == script("commands").help_text(*command.split()[1:]), "run: python docs/commands.py"


def test_the_page_of_commands_is_what_the_script_writes():
    assert (DOCS / "commands.md").read_text(encoding="utf8") == script("commands").page()


def test_ci_finds_the_test_command():
    assert re.search(r"<!-- test command -->\n```bash\n[^`]+```\n<!-- end -->", README)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_readme_names_every_command():
    rows = "\n".join(re.findall(r"^\| `.*$", README, flags=re.MULTILINE))
    for command in set(COMMANDS) - {"batchverify"}:
        assert f"`{command.removeprefix('batchverify ')}" in rows


def prose(page):
    """The text of a page without its code blocks; of a notebook the cells that are text."""
    text = page.read_text(encoding="utf8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCE.sub("", text)


def anchors(page):
    """What the host of the repository makes of a page's headings."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    bare = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in bare}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target.is_relative_to(REPOSITORY) and target.exists()
        if not inside or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_line_of_the_threat_model_names_tests_that_are_there():
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf8")
    table = text.partition("## Who must not achieve what")[2].partition("What is not held")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(lines) >= 15
    for line in lines:
        held_by = line.split("|")[-2]
        assert re.search(r"`tests/[^`]+`", held_by) or "cluster neighbour" in line, line
        file = ""
        for name in re.findall(r"`([^`]+)`", held_by):
            if name.startswith("tests/"):
                file = (REPOSITORY / name).read_text(encoding="utf8")
            else:
                assert f"def {name}(" in file, name


def test_the_index_and_the_site_have_every_page():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= set(LINK.findall((DOCS / "README.md").read_text(encoding="utf8")))
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf8").partition("nav:")[2]
    assert pages <= set(re.findall(r"[\w.-]+\.md", nav))


def block(kind):
    """The README's only code block of a language."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return text


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_manifest_of_the_readme_gives_its_rows(tmp_path, cache):
    manifest = tmp_path / "pairs.csv"
    manifest.write_text(block("csv"), encoding="utf8")
    table = re.search(r"^\| image_a \|.*\n\| ---.*\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    names = cells(table.group().splitlines()[0])
    shown = [dict(zip(names, cells(line), strict=True)) for line in table[1].splitlines()]

    summary = batchverify.score(manifest, image_root=REPOSITORY / "sample_manifests", cache=cache, quiet=True)
    rows = summary.to_arrow().to_pylist()
    assert len(rows) == len(list(csv.DictReader(block("csv").splitlines())))
    assert list(rows[0]) == names
    for row, expected in zip(rows, shown, strict=True):
        for name in ("probability", "similarity"):
            value = expected.pop(name)
            # Another CPU's vectors differ a little.
            assert row.pop(name) == (pytest.approx(float(value), abs=0.02) if value else None)
        assert {name: "" if cell is None else str(cell) for name, cell in row.items()} == expected


def run(code, folder, cache):
    """Run code in `folder`/docs, beside the sample manifests, as a user does."""
    (folder / "docs").mkdir()
    for place in (folder, folder / "docs"):
        (place / "sample_manifests").symlink_to(REPOSITORY / "sample_manifests")
    (folder / "code.py").write_text(code, encoding="utf8")
    changed = {"BATCHVERIFY_CACHE": cache, "TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, folder / "code.py"],
        cwd=folder / "docs",
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_runs(tmp_path, cache):
    said = run(block("python"), tmp_path, cache)
    assert said.startswith("52 {} 0.")
    assert "Same person" in said
    assert (tmp_path / "docs" / "report" / "report.html").is_file()


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs_and_says_what_it_holds(notebook, tmp_path, cache):
    document = json.loads(notebook.read_text(encoding="utf8"))
    codes = ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]
    said = run("\n\n".join(codes), tmp_path, cache)
    assert not list(tmp_path.glob("batchverify-*"))
    printed = [
        "".join(output["text"])
        for cell in document["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    ]
    assert len(printed) >= 4
    # Probabilities, and so the order of near ones, differ from CPU to CPU: words and whole numbers are compared.
    assert sorted(words(said)) == sorted(words("".join(printed)))
    assert notebook.stat().st_size < 100_000


def words(text):
    return re.sub(r"\d+\.\d+", "#", text).split()


def test_paths_stand_in_no_output_of_a_notebook():
    for notebook in DOCS.glob("*.ipynb"):
        assert not re.search(r"/(tmp|home|root|work|Users)/", notebook.read_text(encoding="utf8"))
