"""Devices: which one is meant, and which numbers it computes with."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from batchverify.errors import UsageError


def resolve_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` (`cuda:1`) to a device that is here.

    Raises `UsageError` for another word and for a GPU that is absent.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got '{device}'")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: this machine has no such CUDA device that torch {torch.__version__} can use"
        )
    return device


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def full_float32() -> None:
    """Let GPUs multiply float32 as such, in this process: with TF32, torch's default, boxes move by pixels."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def number_class(numbers: str, device: str) -> torch.dtype:
    """The numbers that a device computes with: those asked for, or with `auto` its fastest. Raises `UsageError`."""
    if numbers == "auto":
        if device.startswith("cuda"):
            # bfloat16 has float32's range: nothing overflows.
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if numbers not in kinds:
        raise UsageError(f"numbers must be auto, {' or '.join(kinds)}, got '{numbers}'")
    return kinds[numbers]
