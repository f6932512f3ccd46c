"""Write docs/commands.md, the help text of every command, from click: `python docs/commands.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from batchverify.cli.app import main

PAGE = Path(__file__).with_name("commands.md")
PREFACE = """\
# Commands

The help text of every command. `python docs/commands.py` writes this page, and a test compares it with the program.
[README](../README.md) says what each command is for, in one line.
"""


def commands(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    """The words that call each command below a group, in the order of `--help`; of groups those that work alone."""
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*names, name)
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


def help_text(*names: str) -> str:
    """What `batchverify NAMES --help` prints in a terminal of 80 columns, the width that click's runner has."""
    result = CliRunner().invoke(main, [*names, "--help"], prog_name="batchverify", catch_exceptions=False)
    return result.output


def page() -> str:
    """The whole page."""
    parts = [PREFACE]
    for names in ((), *commands(main)):
        title = " ".join(("batchverify", *names))
        parts.append(f"## {title}\n\n```text\n{help_text(*names)}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
