"""What a terminal is shown: no commands to it from file names, no secrets."""

import pytest
from click.testing import CliRunner

from batchverify.cli.app import main
from batchverify.cli.output import SECRETS, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b\n\tc é 李", "a b\n\tc é 李"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\rb", "a\\rb"),
        ("\x9b2J", "\\x9b2J"),
        ("gpj\u202e.exe", "gpj\\u202e.exe"),
        ("http://me:word@host/a and https:/me:word@host", "http://…@host/a and https:/…@host"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
    ],
)
def test_control_characters_and_passwords(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("name", SECRETS)
def test_the_values_of_secret_variables(monkeypatch, name):
    monkeypatch.setenv(name, "hunter2-hunter2")
    assert printable("denied for hunter2-hunter2!") == "denied for …!"
    # A word that short is in ordinary messages.
    monkeypatch.setenv(name, "test")
    assert printable("test.csv") == "test.csv"


def test_a_hostile_name_reaches_the_terminal_as_text(tmp_path):
    name = "\x1b[2J\x1b]0;owned\x07.csv"
    (tmp_path / name).write_bytes(b"left,right\na,b\n")
    result = CliRunner().invoke(main, ["score", str(tmp_path / name), "-o", str(tmp_path / "o.parquet")])
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr and "\\x1b[2J" in result.stderr
    (tmp_path / name).write_bytes(b"image_a,image_b\n\x1b[2J.jpg,b.jpg\n")
    result = CliRunner().invoke(main, ["check", str(tmp_path / name)])
    assert "\x1b" not in result.output and "\\x1b[2J.jpg" in result.output
