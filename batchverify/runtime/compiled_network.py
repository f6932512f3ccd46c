"""OpenVINO on this machine's CPU: its capabilities, and compiled networks that threads share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import local
from typing import Any

import numpy as np

from batchverify.errors import first_line
from batchverify.process import require_own_process

# Values of INFERENCE_PRECISION_HINT, which sets the type of layers without 8-bit inputs.
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


@cache
def unavailable() -> str:
    """Why OpenVINO cannot be used here; empty if it can."""
    try:
        core().get_property("CPU", "FULL_DEVICE_NAME")
    except (ImportError, OSError, RuntimeError) as exc:
        return first_line(exc)
    return ""


@cache
def core() -> Any:
    """OpenVINO's entry point, one per process."""
    import openvino

    return openvino.Core()


@cache
def capabilities() -> frozenset[str]:
    """The types that OpenVINO computes in on this CPU: `FP32`, `BF16` (only if the hardware has it), `INT8`, ..."""
    return frozenset(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class CompiledNetwork:
    """A model compiled for this CPU. Any number of threads may call it.

    float_type: `float32` or `bfloat16`, for layers that are not 8-bit. streams: calls that run at the same time.
    threads: CPUs of each stream.
    Raises `RuntimeError` if OpenVINO cannot compile the model, `UsageError` in a process forked from one that
    had computed with OpenVINO.
    """

    def __init__(self, model: Any, *, float_type: str = "float32", streams: int = 1, threads: int = 1) -> None:
        require_own_process("OpenVINO")
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[float_type],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
            # All processes would pin their threads to the same first CPUs.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = core().compile_model(model, "CPU", options)
        self._of_thread = local()

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        """Copies of the model's outputs, for its inputs in order."""
        import openvino

        require_own_process("OpenVINO")
        request = getattr(self._of_thread, "request", None)
        if request is None:
            request = self._of_thread.request = self._compiled.create_infer_request()
        # Kept until the call ends: the tensors below do not own their memory.
        arrays = [np.require(array, requirements=["C", "W"]) for array in inputs]
        for number, array in enumerate(arrays):
            request.set_input_tensor(number, openvino.Tensor(array, shared_memory=True))
        request.infer()
        outputs = range(len(self._compiled.outputs))
        return [request.get_output_tensor(number).data.copy() for number in outputs]
