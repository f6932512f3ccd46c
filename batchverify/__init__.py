"""batchverify: the probability that two face images show two people, for whole tables of pairs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from batchverify.version import __version__

if TYPE_CHECKING:
    from batchverify.embedding.embedder import Embedder
    from batchverify.evaluation.evaluate import evaluate
    from batchverify.scoring.predict import predict
    from batchverify.scoring.score import embed, score
    from batchverify.training.calibrate import calibrate
    from batchverify.training.finetuning.finetune import finetune
    from batchverify.training.train import train

__all__ = [
    "Embedder",
    "__version__",
    "calibrate",
    "embed",
    "evaluate",
    "finetune",
    "predict",
    "score",
    "train",
]

_HOMES = {
    "Embedder": "embedding.embedder",
    "calibrate": "training.calibrate",
    "embed": "scoring.score",
    "evaluate": "evaluation.evaluate",
    "finetune": "training.finetuning.finetune",
    "predict": "scoring.predict",
    "score": "scoring.score",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: `import batchverify` itself needs neither torch nor Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'batchverify' has no attribute '{name}'")
    return getattr(import_module(f"batchverify.{_HOMES[name]}"), name)
