"""The files of jobs/: they run, they are short, their YAML has what its readers require, their commands are ours."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import click
import jsonschema
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from click.testing import CliRunner
from repository import REPOSITORY, SUPPORT

from batchverify.cli.app import main

JOBS = REPOSITORY / "jobs"
SAMPLES = REPOSITORY / "sample_manifests"
SCREEN = 60


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((JOBS / name).read_text(encoding="utf8")))


def run(name: str, folder: Path) -> str:
    environment = {**os.environ, "BATCHVERIFY_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(JOBS / name)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["score_job.py", "train_job.py", "rayjob.yaml", "cluster.yaml", "Dockerfile"])
def test_a_job_fits_on_a_screen(name):
    lines = (JOBS / name).read_text(encoding="utf8").splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 120


def test_the_score_job_runs(tmp_path):
    assert "52 of 52 pairs scored" in run("score_job.py", tmp_path)
    assert pq.read_metadata(tmp_path / "scores.parquet").num_rows == 52


def test_the_train_job_runs(tmp_path, embedded_samples):
    shutil.copytree(embedded_samples, tmp_path / "cache")
    faces = sorted(path.name for path in (SAMPLES / "faces").glob("*.jpg"))
    people = sorted({name.split("_")[0] for name in faces})
    for manifest, half in (("train.csv", people[::2]), ("dev.csv", people[1::2])):
        pairs = combinations([name for name in faces if name.split("_")[0] in half], 2)
        lines = [f"faces/{a},faces/{b},{int(a.split('_')[0] != b.split('_')[0])}" for a, b in pairs]
        (tmp_path / manifest).write_text("\n".join(["image_a,image_b,label", *lines]) + "\n")
    (tmp_path / "faces").symlink_to(SAMPLES / "faces")
    assert "head.safetensors:" in run("train_job.py", tmp_path)
    assert (tmp_path / "head.safetensors").exists()


def require_command(entrypoint: str) -> dict:
    """The arguments of a command line of ours, parsed by our own command line."""
    program, name, *arguments = shlex.split(entrypoint)
    assert program == "batchverify"
    return parse(name, arguments)


def parse(name: str, arguments: list[str]) -> dict:
    parent = click.Context(main, info_name="batchverify", **main.context_settings)
    return main.commands[name].make_context(name, arguments, parent=parent).params


def test_the_rayjob_is_one():
    claim, job = documents("rayjob.yaml")
    jsonschema.validate(job, json.loads((SUPPORT / "schemas" / "rayjob.json").read_text()))
    arguments = require_command(job["spec"]["entrypoint"])
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        assert {Path(arguments[name]).parts[1] for name in ("output", "cache")} == {mount["mountPath"].strip("/")}


@pytest.mark.parametrize("missing", ["headGroupSpec", "rayStartParams", "groupName", "containers", "entrypoint"])
def test_the_schema_sees_what_is_missing(missing):
    _, job = documents("rayjob.yaml")
    schema = json.loads((SUPPORT / "schemas" / "rayjob.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match=missing):
        jsonschema.validate(without(job, missing), schema)


def without(tree: object, name: str) -> object:
    if isinstance(tree, dict):
        return {key: without(value, name) for key, value in tree.items() if key != name}
    return [without(each, name) for each in tree] if isinstance(tree, list) else tree


def test_the_launcher_file_is_one():
    (cluster,) = documents("cluster.yaml")
    # The schema that `ray up` itself reads.
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf8")))
    assert cluster["head_node_type"] in cluster["available_node_types"]
    workers = [each.get("min_workers", 0) for each in cluster["available_node_types"].values()]
    assert 0 < sum(workers) <= cluster["max_workers"]


def test_one_version_of_ray_everywhere():
    files = {name: (JOBS / name).read_text(encoding="utf8") for name in ("rayjob.yaml", "cluster.yaml", "Dockerfile")}
    found = {version for text in files.values() for version in re.findall(r"\d+\.\d+\.\d+", text)}
    assert len(found) == 1
    assert f"ARG RAY={found.pop()}" in files["Dockerfile"]


def test_commands_of_the_readme_that_are_submitted_are_ours():
    text = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf8").replace("\\\n", " ")
    lines = re.findall(r"^batchverify submit [^\n]*? -- ([^\n]+)$", text, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        assert parse(name, arguments)["manifest"]
    options = set(re.findall(r"^batchverify submit [^\n]*?(--[a-z-]+)", text, flags=re.MULTILINE))
    known = CliRunner().invoke(main, ["submit", "--help"]).output
    assert all(option in known for option in options)
