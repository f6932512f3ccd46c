"""`batchverify backbones`: alone it lists them, `export` writes one."""

import json

import pytest
from click.testing import CliRunner

from batchverify.cli.app import main
from batchverify.cli.submit import submit
from batchverify.embedding.backbone import find_spec


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments), prog_name="batchverify")


def test_alone_it_lists_them_for_people_and_programs(tmp_path):
    listed = run("backbones")
    assert listed.exit_code == 0 and listed.stdout.startswith("vggface2: in the package")
    names = [each["name"] for each in json.loads(run("backbones", "--json").stdout)]
    assert all(f"{name}: " in listed.stdout for name in names) and names[1] == "compact"
    refused = run("backbones", "--weights", str(tmp_path / "nowhere"))
    assert refused.exit_code == 2 and "nowhere" in refused.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_export_writes_a_backbone_and_says_where(tmp_path, as_json):
    path = tmp_path / "it.onnx"
    result = run("backbones", "export", "compact", "-o", str(path), *(["--json"] if as_json else []))
    assert result.exit_code == 0 and find_spec(str(path)).size == 128
    if as_json:
        assert json.loads(result.stdout)["onnx"] == str(path)
    else:
        assert result.stdout.splitlines() == [
            f"{path}: compact as ONNX",
            f"{tmp_path / 'it.json'}: the faces that it takes",
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "export", "compact", "-o", "it.onnx"], "backbones: put the options after 'export'"),
        (["export", "compact"], "Missing option '-o'"),
        (["export", "-o", "it.onnx"], "Missing argument 'BACKBONE'"),
        (["export", "compact", "-o", "it.pt"], "-o must end in .onnx, got it.pt"),
        (["export", "compact", "-o", "nowhere/it.onnx"], "nowhere/it.onnx: cannot be written: No such file"),
        (["export", "none.safetensors", "-o", "it.onnx"], "none.safetensors: no such weights file"),
        (["import"], "No such command 'import'"),
    ],
)
def test_wrong_calls(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("backbones", *arguments)
    assert result.exit_code in (1, 2) and message in result.stderr
    assert not isinstance(result.exception, OSError) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["backbones"], "VARIABLE"),
        (["backbones", "--json"], "VARIABLE"),
        (["backbones", "export", "compact", "-o", "/shared/it.onnx"], "VARIABLE"),
        (["backbones", "export", "compact", "-o", "it.onnx"], "it.onnx: a relative output would be deleted"),
        (["backbones", "export", "compact"], "Missing option '-o'"),
        (["cache"], "submit: '' is not a command for a cluster"),
    ],
)
def test_it_can_be_submitted_like_other_commands(command, message):
    """A variable that is not set is found after the command was parsed, and before the server is asked."""
    assert submit.name in main.commands
    options = ["--address", "http://127.0.0.1:1", "--env", "VARIABLE"]
    result = run("submit", *options, "--", *command)
    assert result.exit_code == 2 and message in result.stderr
