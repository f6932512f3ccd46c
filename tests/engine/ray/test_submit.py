"""`submit` without a cluster: what is sent along, which paths and addresses are refused, and why."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray_nodes import free_port
from repository import REPOSITORY

from batchverify.cli.app import main
from batchverify.engine.ray.submit import Submission
from batchverify.errors import UsageError

URL = "http://127.0.0.1:1"


def refused(*arguments: str, env: dict | None = None) -> str:
    """The message of a command line that ends with 2 before anything is submitted."""
    result = CliRunner(env={"RAY_API_SERVER_ADDRESS": None, **(env or {})}).invoke(main, ["submit", *arguments])
    assert result.exit_code == 2, result.output
    return result.stderr


def test_the_entrypoint_is_quoted_for_the_shell():
    command = ("score", "a b.csv", "-o", "/out/it's.parquet")
    assert Submission(command).entrypoint == (
        "exec python -m batchverify.cli score 'a b.csv' -o '/out/it'\"'\"'s.parquet'"
    )


def test_what_goes_along(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_TEST", "hush")
    submission = Submission(("embed", "x.csv"), ("SECRET_OF_TEST",), str(tmp_path), pip=("pillow-heif==1.1.0",))
    prepared = submission.runtime_env()
    assert prepared["env_vars"]["SECRET_OF_TEST"] == "hush"
    assert prepared["working_dir"] == str(tmp_path)
    assert prepared["pip"] == ["pillow-heif==1.1.0"]
    assert [Path(each).name for each in prepared["py_modules"]] == ["batchverify"]
    assert (Path(prepared["py_modules"][0]) / "cli" / "__main__.py").exists()
    assert "hush" not in repr(submission)
    assert set(Submission(("embed", "x.csv"), package=False).runtime_env()) == {"env_vars"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ABSENT_OF_TEST", "--env ABSENT_OF_TEST: this variable is not set here"),
        ("KEY=hush", "--env KEY: give only the name; other users can read the values on a command line"),
    ],
)
def test_variables_that_cannot_go_along(name, message):
    with pytest.raises(UsageError, match=message):
        Submission(("embed", "x.csv"), (name,)).runtime_env()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "score s3://b/p.csv -o out.parquet",
            "out.parquet: a relative output would be deleted with the job's folder",
        ),
        (
            "score s3://b/p.csv -o s3://b/out --cache c",
            "c: a relative cache would be deleted with the job's folder",
        ),
        ("score p.csv -o s3://b/out", "p.csv: a relative path means nothing on the cluster"),
        (
            "score s3://b/p.csv -o s3://b/out --head h.safetensors",
            "h.safetensors: a relative path means nothing",
        ),
        ("score s3://b/p.csv -o s3://b/out --backbone b.pt", "b.pt: a relative path means nothing"),
        ("score s3://b/p.csv -o s3://b/out --backbone b.onnx", "b.onnx: a relative path means nothing"),
        ("score s3://b/p.csv -o s3://b/out --backbone compact+b.pth", "b.pth: a relative path means nothing"),
        ("score s3://b/p.csv", "Missing option '-o' / '--output'"),
        ("score s3://b/p.csv -o s3://b/out --crop nose", "'nose' is not one of"),
        ("grade s3://b/p.csv", "submit: 'grade' is not a command for a cluster"),
        ("submit -- score p.csv", "submit: 'submit' is not a command for a cluster"),
        ("cache polish", "submit: 'polish' is not a command for a cluster"),
    ],
)
def test_mistakes_in_the_command_are_said_before_a_cluster_is_asked(command, message):
    assert message in refused("--address", URL, "--", *command.split())


def test_a_relative_manifest_must_lie_in_the_working_folder(tmp_path):
    message = refused("--address", URL, "--working-dir", str(tmp_path), "--", "score", "p.csv", "-o", "/x.parquet")
    assert f"p.csv: not in --working-dir {tmp_path}" in message
    (tmp_path / "p.csv").touch()
    submission = Submission((), working_dir=str(tmp_path))
    assert submission.require_paths({"manifest": "p.csv", "output": "/x.parquet", "head": None}) == []
    assert submission.require_paths({"manifest": "part-*.csv", "head": "/h.safetensors"}) == ["/h.safetensors"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "ray://head:10001",
            "job server, http://HEAD:8265; ray:// is for Ray Client, which breaks long jobs",
        ),
        ("head:6379", "--address head:6379: submit needs the address of the cluster's job server"),
        ("auto", "--address auto: submit needs the address of the cluster's job server"),
    ],
)
def test_addresses_that_are_no_job_server(address, message):
    assert message in refused("--address", address, "--status", "job")


@pytest.mark.parametrize("options", [["--status", "a", "--stop", "b"], ["--status", "a", "--", "backbones"], []])
def test_one_thing_at_a_time(options):
    assert "give one of: -- COMMAND" in refused("--address", URL, *options)


def test_without_an_address_the_option_is_named():
    assert "Missing option '--address'" in refused("--status", "job")


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
        check=False,
    )


def test_no_cluster_there():
    url = f"http://127.0.0.1:{free_port()}"
    done = run(f"from batchverify.cli.app import main; main(['submit', '--address', '{url}', '--status', 'job'])")
    assert done.returncode == 1
    assert f"batchverify: {url}: the cluster's job server cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_variable_leaves_messages_readable():
    url = f"http://127.0.0.1:{free_port()}"
    done = run(
        "import os; os.environ |= {'EMPTY': '', 'KEY': 'hush'}\n"
        "from batchverify.engine.ray.submit import JobServer\n"
        f"server = JobServer.__new__(JobServer); server.address = '{url}'\n"
        "with server._our_errors(['', 'hush']): raise RuntimeError('no place for hush')"
    )
    assert done.stderr.endswith(f"{url}: no place for ***\n")


def test_without_rays_job_client_the_extra_is_named():
    block = "import sys; sys.modules['aiohttp'] = None"
    done = run(
        f"{block}\nfrom batchverify.cli.app import main; main(['submit', '--address', '{URL}', '--stop', 'job'])"
    )
    assert done.returncode == 2
    assert "batchverify: submit needs Ray's job client (aiohttp is missing)" in done.stderr
    assert "pip install 'batchverify[cluster]'" in done.stderr
