"""From options to what the stages need: the backbone's fingerprint, and the plan that workers are given."""

from __future__ import annotations

from pathlib import Path

from batchverify.embedding.backbone import find_fingerprint
from batchverify.engine.base import WorkPlan
from batchverify.engine.stages import LoadPlan
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.options import EmbedOptions
from batchverify.progress import show_download
from batchverify.storage.location import Location


def backbone_fingerprint(options: EmbedOptions) -> str:
    """The fingerprint of the options' backbone, fetched where it must be. Raises as `load_backbone` does."""
    weights = Path(options.weights) if options.weights else None
    download = None if options.quiet else show_download
    # The workers read the weights themselves.
    return find_fingerprint(options.backbone, weights, progress=download)


def work_plan(
    options: EmbedOptions, settings: EmbeddingSettings, fingerprint: EmbeddingFingerprint
) -> WorkPlan:
    """What workers need to know to embed under `settings`, whose fingerprint is given."""
    root = options.cache_root
    # Workers may run in another folder: every path is made absolute.
    cache = str(Location.parse(root)) if root is not None else None
    load = LoadPlan(settings, fingerprint, options.limits, cache, options.retry_failed)
    is_file = bool(Path(options.backbone).suffix)
    backbone = str(Path(options.backbone).resolve()) if is_file else options.backbone
    weights = str(Path(options.weights).resolve()) if options.weights else None
    return WorkPlan(
        load, backbone, weights, options.device, options.runtime, options.batch_size, options.numbers
    )
