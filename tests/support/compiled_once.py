"""Models that are alike are compiled once in a session of tests: the backbone takes a second, in hundreds of tests.

Everything of ours runs as always, from the weights file to the model. What OpenVINO makes of a model is kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

# Compiled models that are kept, those used last: the backbone takes 100 MB.
KEPT = 12


class CompilingCore:
    """OpenVINO's entry point, which gives what it compiled before for a model of the same digest and options."""

    def __init__(self, core: Any) -> None:
        self._core, self._compiled = core, OrderedDict[tuple[str, str, str], Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def compile_model(self, model: Any, device: str, options: Mapping[str, object]) -> Any:
        """See `openvino.Core`."""
        key = digest(model), device, repr(sorted(options.items()))
        if key not in self._compiled:
            self._compiled[key] = self._core.compile_model(model, device, options)
        self._compiled.move_to_end(key)
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[key]


def digest(model: Any) -> str:
    """Of all that a model computes: its operations, their order, types and shapes, and every constant."""
    found, numbers = hashlib.blake2b(), dict[str, int]()
    for number, operation in enumerate(model.get_ordered_ops()):
        numbers[operation.get_name()] = number
        sources = [each.get_source_output() for each in operation.inputs()]
        said = (
            operation.get_type_name(),
            sorted((name, str(value)) for name, value in operation.get_attributes().items()),
            [(numbers[source.get_node().get_name()], source.get_index()) for source in sources],
            [(str(each.get_element_type()), str(each.get_partial_shape())) for each in operation.outputs()],
        )
        found.update(repr(said).encode())
        if operation.get_type_name() == "Constant":
            found.update(operation.data)
    return found.hexdigest()
