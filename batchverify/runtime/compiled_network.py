"""OpenVINO on this machine's CPU: what it multiplies in hardware, and compiled networks that threads share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import local
from typing import Any

import numpy as np

from batchverify.errors import first_line

# What INFERENCE_PRECISION_HINT calls the types that layers without 8-bit inputs compute in.
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


@cache
def unavailable() -> str:
    """Why OpenVINO cannot be used here, or nothing where it can."""
    try:
        core().get_property("CPU", "FULL_DEVICE_NAME")
    except (ImportError, OSError, RuntimeError) as exc:
        return first_line(exc)
    return ""


@cache
def core() -> Any:
    """OpenVINO's entry point, one for the process."""
    import openvino

    return openvino.Core()


@cache
def capabilities() -> frozenset[str]:
    """What OpenVINO says this CPU computes in: `FP32`, `BF16` (only where the hardware has it), `INT8`, ..."""
    return frozenset(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class CompiledNetwork:
    """A model compiled for this CPU; any number of threads may call it, each with a request of its own.

    float_type: `float32` or `bfloat16`, for everything that is not 8-bit. streams: calls that run side by side.
    threads: CPUs of each stream.
    Raises `RuntimeError` where OpenVINO cannot compile the model.
    """

    def __init__(
        self, model: Any, *, float_type: str = "float32", streams: int = 1, threads: int = 1
    ) -> None:
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[float_type],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
            # Every process would pin its threads to the same first CPUs.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = core().compile_model(model, "CPU", options)
        self._of_thread = local()

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        """The model's outputs, as copies, for its inputs in order."""
        import openvino

        request = getattr(self._of_thread, "request", None)
        if request is None:
            request = self._of_thread.request = self._compiled.create_infer_request()
        # Held until the call is over: the tensors below do not own their memory.
        arrays = [np.require(each, requirements=["C", "W"]) for each in inputs]
        for number, array in enumerate(arrays):
            request.set_input_tensor(number, openvino.Tensor(array, shared_memory=True))
        request.infer()
        outputs = range(len(self._compiled.outputs))
        return [request.get_output_tensor(number).data.copy() for number in outputs]
