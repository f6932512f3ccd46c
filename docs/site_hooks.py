"""What MkDocs needs beside docs/: pages for files that are linked from there, and a page for the notebook.

On the host of the repository links such as `../SECURITY.md` work as they are. In the site such files lie below
`repository/`, and links to them are changed on the way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!!)\[([^][]*)\]\(([^():#\s]+)(#[^()\s]*)?\)|(?<=\]\()([^():#\s]+)(?=\))")
# What pandas puts around its tables; without it they look like the site's others.
STYLE = re.compile(r"<style scoped>.*?</style>\n?|(?<=<table) border=\"1\" class=\"dataframe\"", re.DOTALL)
# Where each page of the site comes from.
SOURCES: dict[str, Path] = {}


def on_files(files: Any, config: Any) -> Any:
    """Add the notebook's page and every file outside docs/ that a page links to, directly or not."""
    from mkdocs.structure.files import File

    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    for notebook in sorted(DOCS.glob("*.ipynb")):
        files.append(File.generated(config, _place(notebook), content=notebook_page(notebook)))
        SOURCES[_place(notebook)] = notebook
    while pages:
        page = pages.pop()
        SOURCES[_place(page)] = page
        for target in linked_files(page):
            if not target.is_relative_to(DOCS) and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(target)))
                if target.suffix == ".md":
                    pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change the links of a page to where the site has their targets; folders have no page and lose their link."""
    here = SOURCES[page.file.src_uri].parent

    def change(match: re.Match[str]) -> str:
        text, link, anchor, image = match.groups()
        target = Path(os.path.normpath(here / (link or image)))
        if not target.exists():
            return match.group()
        moved = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        if image:
            return moved
        return text if target.is_dir() else f"[{text}]({moved}{anchor or ''})"

    return LINK.sub(change, markdown)


def linked_files(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for match in LINK.finditer(page.read_text(encoding="utf8")):
        target = Path(os.path.normpath(page.parent / (match[2] or match[4])))
        if target.is_file() and target.is_relative_to(ROOT):
            yield target


def notebook_page(path: Path) -> str:
    """A notebook, with the outputs that it holds, as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            elif "text/html" in data:
                parts.append(STYLE.sub("", "".join(data["text/html"])))
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _place(path: Path) -> str:
    """The name that a file of the repository has in the site's folder of sources."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
    return f"repository/{path.relative_to(ROOT).as_posix()}"
