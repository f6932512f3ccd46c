"""Fine-tuning in several processes of Ray Train, on one machine or a cluster; each step is that of `fit`.

A step takes `accumulate` batches for each worker. One worker with twice `accumulate` ends with the same weights as
two workers, but for rounding.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchverify.engine.ray.start import running_ray
from batchverify.errors import BatchverifyError, UsageError, first_line
from batchverify.options import FinetuneOptions
from batchverify.training.finetuning.checkpoint import Checkpoint
from batchverify.training.finetuning.fit import FinetuneFit, FinetuneTask, Progress, Report, finished, fit
from batchverify.training.finetuning.team import Team

# How often workers that died are replaced; the new ones go on from the checkpoint.
RESTARTS = 3
# Pause between two looks at the checkpoint.
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class RayTeam(Team):
    """The workers of Ray Train, whose tensors torch sums up."""

    def joined(self, module: nn.Module) -> nn.Module:
        """See `Team`."""
        from ray.train.torch import prepare_model

        return prepare_model(module, move_to_device=False)

    def apart(self, joined: nn.Module) -> AbstractContextManager[None]:
        """See `Team`."""
        return cast(DistributedDataParallel, joined).no_sync()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Team`."""
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def level(self, module: nn.Module) -> None:
        """See `Team`."""
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def fit_on_workers(task: FinetuneTask, report: Report = lambda _: None) -> FinetuneFit:
    """As `fit`, by `options.workers` processes; one worker is this process, without Ray.

    The workers read and write the task's folder and what its stored images come from, so on a cluster all nodes must
    see them. Raises what `fit` raises, `UsageError` for more workers than CPUs or GPUs, and `BatchverifyError` if
    workers keep dying.
    """
    if task.options.workers == 1:
        return fit(task, report)
    check_installed()
    task.network.cpu()
    options = task.options
    ray = running_ray(options.address, options.num_cpus, options.verbose)
    with ray, _watched(task.folder, report):
        _train(task)
    return finished(task.network, task.folder)


def check_installed() -> None:
    """Raise `UsageError` if Ray Train's own requirements are not installed."""
    try:
        import ray.train.torch  # noqa: F401
    except ImportError as exc:
        raise UsageError("--workers needs Ray Train: pip install 'ray[train]'") from exc


def cpus_each(nodes: Sequence[float], workers: int) -> int:
    """The most CPUs that each of so many workers can have on nodes with so many CPUs; 0 if there are too few."""
    most = int(max(nodes, default=0))
    fitting = (each for each in range(most, 0, -1) if sum(node // each for node in nodes) >= workers)
    return next(fitting, 0)


def _train(task: FinetuneTask) -> None:
    """Run the workers until they are done, replacing dead ones. Raises `BatchverifyError`."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    options, folder = task.options, task.folder
    cpus, has_gpus = _share(options)
    scaling = ScalingConfig(
        num_workers=options.workers,
        use_gpu=has_gpus,
        resources_per_worker={"CPU": cpus, "GPU": int(has_gpus)},
    )
    work = {"task": ray.put(task), "threads": cpus}
    for attempt in range(RESTARTS + 1):
        name = f"ray-{uuid.uuid4().hex[:8]}"
        run = RunConfig(name=name, storage_path=str(folder.absolute()), failure_config=FailureConfig(max_failures=0))
        try:
            TorchTrainer(_work, train_loop_config=work, scaling_config=scaling, run_config=run).fit()
            return
        except Exception as exc:
            if (own := _own_error(exc)) is not None:
                raise own from exc
            if attempt == RESTARTS:
                raise BatchverifyError(
                    f"--workers {options.workers}: the workers died {RESTARTS + 1} times, the last time "
                    f"with: {first_line(exc)}; the same command continues from the checkpoint"
                ) from exc
        finally:
            shutil.rmtree(folder / name, ignore_errors=True)


def _work(work: dict[str, Any]) -> None:
    """What a worker does."""
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    torch.set_num_threads(work["threads"])
    context = get_context()
    team = RayTeam(get_device(), context.get_world_rank(), context.get_world_size())
    fit(ray.get(work["task"]), team=team)


def _share(options: FinetuneOptions) -> tuple[int, bool]:
    """(CPUs of each worker, whether each has a GPU). Raises `UsageError` if there are too few."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    has_gpus = options.device.startswith("cuda") or (options.device == "auto" and gpus >= options.workers)
    if has_gpus and gpus < options.workers:
        raise UsageError(f"--workers {options.workers} with --device {options.device}: Ray has {gpus} GPUs")
    cpus = cpus_each([node.get("CPU", 0) for node in nodes], options.workers)
    if not cpus:
        have = int(sum(node.get("CPU", 0) for node in nodes))
        raise UsageError(f"--workers {options.workers} needs a CPU for each, but Ray has {have}")
    return cpus, has_gpus


def _own_error(exc: BaseException) -> BatchverifyError | None:
    """The error of ours that a worker raised, if that is what ended the workers."""
    failures = list(getattr(exc, "worker_failures", {}).values())
    for failure in [exc, *failures]:
        cause: BaseException | None = failure
        while cause is not None and not isinstance(cause, BatchverifyError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            return cause
    return None


@contextmanager
def _watched(folder: Path, report: Report) -> Iterator[None]:
    """Report the epochs of the workers, as their checkpoints tell, from a thread and at the end."""
    ended, seen = Event(), 0

    def look() -> None:
        nonlocal seen
        values = Checkpoint.peek(folder)
        if values is None:
            return
        epochs = Progress.of_json(values).epochs
        for epoch in epochs[seen:]:
            report(epoch)
        seen = len(epochs)

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            look()

    thread = Thread(target=watch, name="watch-checkpoint", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
