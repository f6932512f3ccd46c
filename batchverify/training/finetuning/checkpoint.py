"""The state of a training on disk: one file, replaced as a whole, in which no code can hide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from batchverify.documents import MOST_METADATA, read_document
from batchverify.embedding.forward import is_out_of_memory
from batchverify.errors import ArtifactError, BatchverifyError
from batchverify.storage.location import Location

NAME = "checkpoint.safetensors"
KEY = "training"
# The length of a safetensors file's header, before it.
LENGTH_BYTES = 8
# What AdamW keeps of each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and what else a training must know, as JSON. identity: what training this is."""

    identity: str
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write to a folder, which is made, atomically. Raises `BatchverifyError` if the disk does not take it."""
        metadata = {KEY: json.dumps({"identity": self.identity, **self.progress})}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        target = Location.parse(folder / NAME)
        try:
            target.parent.make_folder()
            target.write_bytes(save(tensors, metadata))
        except OSError as exc:
            raise BatchverifyError(f"{target}: the checkpoint cannot be written: {exc.strerror}") from exc

    @classmethod
    def read(cls, folder: Path, identity: str | None = None) -> Checkpoint | None:
        """That of a folder; None if there is none.

        identity: the training that it must be of, None for any. Raises `ArtifactError` for one of another training
        or a damaged one.
        """
        path = folder / NAME
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ArtifactError(f"{path}: the checkpoint cannot be read: {exc.strerror}") from exc
        with sound(folder):
            progress = _progress(data)
            stored_identity, tensors = str(progress.pop("identity")), load(data)
        if identity is not None and stored_identity != identity:
            raise ArtifactError(
                f"{path}: the checkpoint belongs to a training with other options, pairs or images: give the same "
                "ones, or remove it to start again"
            )
        return cls(stored_identity, tensors, progress)

    @staticmethod
    def peek(folder: Path) -> dict[str, Any] | None:
        """The progress of a folder's checkpoint without its tensors; None if it cannot be read."""
        with suppress(OSError, LookupError, ValueError, TypeError), (folder / NAME).open("rb") as file:
            start = file.read(LENGTH_BYTES)
            header = file.read(min(int.from_bytes(start, "little"), MOST_METADATA))
            progress = _progress(start + header)
            del progress["identity"]
            return progress
        return None

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that `named` gave this name."""
        start = f"{name}."
        return {key.removeprefix(start): each for key, each in self.tensors.items() if key.startswith(start)}


def named(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with a name before their own."""
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def moments_of(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What AdamW keeps, by the number of the parameter."""
    return {
        f"{number}.{moment}": optimiser.state[parameter][moment]
        for number, parameter in enumerate(_parameters(optimiser))
        if optimiser.state[parameter]
        for moment in MOMENTS
    }


def restore_moments(optimiser: torch.optim.Optimizer, moments: Mapping[str, torch.Tensor]) -> None:
    """Give AdamW what `moments_of` returned. Raises `LookupError` and `ValueError` for what does not fit."""
    for number, parameter in enumerate(_parameters(optimiser)):
        if f"{number}.step" in moments:
            step, *others = (moments[f"{number}.{moment}"] for moment in MOMENTS)
            for each in others:
                require_alike({"moment": each}, {"moment": parameter})
            # In the parameter's own memory order, as AdamW would make them.
            copies = [torch.empty_like(parameter, requires_grad=False).copy_(each) for each in others]
            optimiser.state[parameter] = dict(zip(MOMENTS, [step, *copies], strict=True))


def require_alike(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless the names and the shapes are the same."""
    shapes, wanted = ({name: tuple(each.shape) for name, each in some.items()} for some in (found, expected))
    if shapes != wanted:
        raise ValueError(f"tensors {shapes}, not {wanted}")


def digest_of(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors, in their memory order."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _parameters(optimiser: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    for group in optimiser.param_groups:
        yield from group["params"]


@contextmanager
def sound(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a folder's checkpoint in the block into `ArtifactError`, unless memory ran out."""
    try:
        yield
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and is_out_of_memory(exc):
            raise
        raise ArtifactError(f"{folder / NAME}: the checkpoint is damaged: remove it to start again") from exc


def _progress(data: bytes) -> dict[str, Any]:
    """What a file says beside its tensors. data: of its header at least. Raises as `sound` expects."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    header = read_document(data[LENGTH_BYTES : LENGTH_BYTES + length])
    progress = read_document(header["__metadata__"][KEY])
    if not isinstance(progress, dict):
        raise TypeError("no JSON object")
    return progress
