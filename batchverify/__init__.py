"""batchverify: the probability that two face images show two people, for whole tables of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchverify.version import __version__

if TYPE_CHECKING:
    from batchverify.embedding.embedder import Embedder
    from batchverify.evaluation.evaluate import evaluate
    from batchverify.scoring.predict import predict
    from batchverify.scoring.score import embed, score
    from batchverify.train_workflow import train

__all__ = ["Embedder", "__version__", "embed", "evaluate", "predict", "score", "train"]


def __getattr__(name: str) -> Any:
    """Load what is asked for: `import batchverify` itself needs neither torch nor Ray."""
    if name == "Embedder":
        from batchverify.embedding.embedder import Embedder

        return Embedder
    if name == "predict":
        from batchverify.scoring.predict import predict

        return predict
    if name == "evaluate":
        from batchverify.evaluation.evaluate import evaluate

        return evaluate
    if name == "train":
        from batchverify.train_workflow import train

        return train
    if name in __all__:
        from batchverify.scoring import score as workflows

        return getattr(workflows, name)
    raise AttributeError(f"module 'batchverify' has no attribute '{name}'")
