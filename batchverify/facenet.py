"""facenet-pytorch's network, without what importing its package brings along: a second of torchvision."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType

PACKAGE = "facenet_pytorch"
_IMPORTING = Lock()


def inception() -> ModuleType:
    """The module `facenet_pytorch.models.inception_resnet_v1`, the same at every call."""
    with _IMPORTING:
        return _inception()


@cache
def _inception() -> ModuleType:
    """Import the module under bare packages, whose `__init__` is not run, and take those away again."""
    folder = _folder()
    known = {name: module for name, module in sys.modules.items() if _is_facenet(name)}
    for name in (PACKAGE, f"{PACKAGE}.models"):
        bare = ModuleType(name)
        bare.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = bare
    try:
        return importlib.import_module(f"{PACKAGE}.models.inception_resnet_v1")
    finally:
        for name in [name for name in sys.modules if _is_facenet(name)]:
            del sys.modules[name]
        sys.modules.update(known)


def _is_facenet(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _folder() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install 'facenet-pytorch>=2.5.3,<2.6'")
    return Path(spec.origin).parent
