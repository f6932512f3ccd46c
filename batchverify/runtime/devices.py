"""The device and the runtime of the networks, and the number of CPUs."""

from __future__ import annotations

import os
import re
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from batchverify.errors import UsageError
from batchverify.options import RUNTIMES

if TYPE_CHECKING:
    import numpy as np
    import torch

# Sets what `--runtime auto` means.
RUNTIME_VARIABLE = "BATCHVERIFY_RUNTIME"
# The threads that are the only one left of a forked process.
_forked: set[int] = set()
# Device files of GPUs that torch can use: NVIDIA's, also on Jetson and in WSL, and AMD's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvmap", "/dev/dxg", "/dev/kfd")


def resolve_device(device: str) -> str:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`. torch is imported only if there may be a GPU.

    Raises `UsageError` for an unknown or absent device.
    """
    if device == "auto":
        return "cuda" if _has_gpu() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got '{device}'")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu":
        import torch

        if number >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: this machine has no such CUDA device that torch {torch.__version__} can use"
            )
    return device


def _has_gpu() -> bool:
    if not any(Path(name).exists() for name in _GPU_FILES):
        return False
    import torch

    return torch.cuda.is_available()


def resolve_runtime(runtime: str, device: str) -> str:
    """The runtime on a resolved device. `auto` is `openvino` on a CPU if it can be loaded, else `torch`.

    `$BATCHVERIFY_RUNTIME` sets what `auto` means on a CPU.
    Raises `UsageError` for an unknown runtime, and for OpenVINO if it cannot be used.
    """
    if device == "cpu" and runtime == "auto":
        runtime = os.environ.get(RUNTIME_VARIABLE) or "auto"
    if runtime not in RUNTIMES:
        raise UsageError(f"--runtime or ${RUNTIME_VARIABLE} must be one of {', '.join(RUNTIMES)}, got '{runtime}'")
    if runtime == "torch" or (runtime == "auto" and device != "cpu"):
        return "torch"
    if device != "cpu":
        raise UsageError(f"--runtime openvino computes on the CPU, not on {device}: add --device cpu")
    from batchverify.runtime.compiled_network import unavailable

    why = unavailable()
    if why and runtime == "openvino":
        raise UsageError(f"--runtime openvino: OpenVINO cannot be used here: {why}")
    return "torch" if why else "openvino"


def available_cpus() -> int:
    """How many CPUs this process may use, by its affinity and the container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@cache
def survive_forks() -> None:
    """Let processes that are forked from this one go on computing in torch: with one thread where they were forked.

    OpenMP would wait there for threads that it had before. Threads that are started later get their own.
    """
    os.register_at_fork(after_in_child=_compute_alone)


def _compute_alone() -> None:
    import torch

    _forked.add(threading.get_ident())
    torch.set_num_threads(1)


def limit_torch(threads: int) -> None:
    """Limit the CPUs of torch in the calling thread. See `survive_forks`."""
    import torch

    survive_forks()
    torch.set_num_threads(1 if threading.get_ident() in _forked else threads)


def on_device(array: np.ndarray, device: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array as a tensor on a device, of its own type unless `dtype` says another; 4-D ones channels last."""
    import torch

    tensor = torch.from_numpy(array).to(device, dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def full_float32() -> None:
    """Switch TF32 off for GPUs in this process: with TF32, torch's default, boxes move by pixels."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
