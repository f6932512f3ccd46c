"""Shared fixtures: where the real weights and faces lie, embedded samples, a Ray that runs."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import openvino
import pytest
from compiled_once import CompilingCore
from repository import REPOSITORY, SUPPORT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that must find no Ray come last: the others share one, whose start takes five CPU seconds."""
    items.sort(key=lambda item: "no_ray" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real weights and faces, or a skip that says how to supply it."""
    folder = Path(os.environ.get("BATCHVERIFY_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no real weights and faces at {folder}; set BATCHVERIFY_SHARED")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """OpenVINO compiles each model once in this process; those of processes that tests start, they compile."""
    core = openvino.Core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino, "Core", lambda: CompilingCore(core()))
        yield


@pytest.fixture(scope="session")
def embedded_samples(tmp_path_factory) -> Path:
    """A cache that holds the sample faces: to be copied, not to be written to."""
    import batchverify

    folder = tmp_path_factory.mktemp("embedded") / "cache"
    batchverify.embed(REPOSITORY / "sample_manifests" / "faces.csv", cache=str(folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def cache(embedded_samples, tmp_path_factory) -> str:
    """A cache that holds the sample faces, one a test file."""
    return shutil.copytree(embedded_samples, str(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(params=["one.parquet", "folder"])
def out(request, tmp_path) -> Path:
    """An output's path: a file and a folder."""
    return tmp_path / "o" / request.param


@pytest.fixture(scope="session")
def ray_module() -> Iterator[ModuleType]:
    """Ray; what runs of it in this process at the end of the session is shut down."""
    import ray

    yield ray
    ray.shutdown()


@pytest.fixture
def running_ray(ray_module) -> ModuleType:
    """A Ray with two CPUs in this process: that of the tests before, if it runs."""
    if not ray_module.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            # Ray's own 15 has workers wait for all other processes of a busy machine.
            patch.setenv("RAY_worker_niceness", "0")
            # In the environment, not in `runtime_env`: with that every worker would be started by a process that
            # imports Ray too.
            patch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
            ray_module.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    return ray_module


@pytest.fixture
def no_ray(ray_module) -> None:
    """No Ray runs in this process: the test starts its own."""
    ray_module.shutdown()
