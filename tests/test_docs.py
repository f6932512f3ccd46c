"""The README says what the program says."""

import re

import pytest
from click.testing import CliRunner
from repository import REPOSITORY

from batchverify.cli.app import main

README = (REPOSITORY / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"<!-- help: (.*?) -->\n```text\n(.*?)```", README, flags=re.S)


def help_text(arguments: list[str]) -> str:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(main, [*arguments, "--help"], prog_name="batchverify")
    return result.output


def test_every_command_is_there():
    names = {name for name, _ in BLOCKS}
    commands = set(main.commands) - {"prepare", "cache"}
    groups = {f"{group} {name}" for group in ("prepare", "cache") for name in main.commands[group].commands}
    assert names == {"batchverify"} | {f"batchverify {name}" for name in commands | groups}


@pytest.mark.parametrize(("command", "text"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_help_texts_are_the_real_ones(command, text):
    assert text == help_text(command.split()[1:])


def test_ci_finds_the_test_command():
    assert re.search(r"<!-- test command -->\n```bash\n[^`]+```\n<!-- end -->", README)
