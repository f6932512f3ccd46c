"""The head that scored a run: its threshold, for `evaluate --at-far`, and the share that its probabilities assume."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from batchverify.errors import ArtifactError, BatchverifyError, UsageError
from batchverify.evaluation.scores import ScoreFile, Scores
from batchverify.fingerprint import FUSION, EmbeddingFingerprint
from batchverify.heads.fused_head import FusedHead, fused_head_name
from batchverify.heads.head import Head, default_head_name, shipped_head
from batchverify.heads.prior import BALANCED, BaseRate, fitted_share
from batchverify.options import EvaluateOptions


def chosen_threshold(file: ScoreFile, options: EvaluateOptions) -> float | None:
    """The threshold that the options ask for; None for that of the run.

    Raises `UsageError` if the head of the scores is not known or lacks the threshold.
    """
    if options.at_far is None:
        return options.threshold
    head = scoring_head(file, options.head)
    threshold = head.threshold(None, options.at_far, options.confidence)
    share = (file.record.get("prior") or {}).get("share")
    if not isinstance(share, float):
        return threshold
    # With `--prior` the probabilities were shifted, and so is the threshold.
    return BaseRate(share, fitted_share(head.about)).threshold(threshold)


def scoring_head(file: ScoreFile, path: str | None) -> Head | FusedHead:
    """The head that made the scores. path: its file; None for that of the run record, or else the shipped one.

    Raises `UsageError` if it is not known or the file is another head, `ArtifactError` if it cannot be read.
    """
    record = file.record
    digest, embedding = record.get("head"), record.get("embedding") or {}
    known = path or (record.get("options") or {}).get("head")
    if not digest or not (known or embedding):
        raise UsageError(f"{file.name}: no run record that names a head, so --at-far has none to ask")
    fused = FUSION in embedding
    if not known:
        fingerprint = EmbeddingFingerprint(embedding).with_default_choice()
        known = shipped_head(fused_head_name(fingerprint) if fused else default_head_name(fingerprint))
    try:
        head = FusedHead.load(known) if fused else Head.load(known)
    except ArtifactError as exc:
        raise ArtifactError(f"{exc}; give the head of the scores with --head") from exc
    if head.digest != digest:
        raise UsageError(f"{known}: not the head that scored {file.name}; give that one with --head")
    return head


def head_of_run(file: ScoreFile) -> Head | FusedHead | None:
    """The head that made the scores: where the run had it, or the shipped one; None if it is not known."""
    with suppress(BatchverifyError, LookupError, TypeError, ValueError, AttributeError):
        return scoring_head(file, None)
    return None


def calibrated_shares(head: Head | FusedHead | None, record: Mapping[str, Any]) -> tuple[float, float]:
    """The shares of same pairs for which the head was calibrated, and for which the probabilities of the run are.

    They differ with `--prior`. Where the head is not known, half of the pairs.
    """
    fitted = fitted_share(head.about) if head is not None else BALANCED
    share = (record.get("prior") or {}).get("share")
    return fitted, share if isinstance(share, float) and 0 < share < 1 else fitted


def with_assumed_share(scores: Scores) -> Scores:
    """With the share of same pairs for which the probabilities are; half of them for scores that are none."""
    if not scores.calibrated:
        return scores
    # A record may be another person's, and its URI would choose a server.
    stated = str((scores.file.record.get("options") or {}).get("head") or "")
    head = head_of_run(scores.file) if "://" not in stated else None
    return replace(scores, assumed=calibrated_shares(head, scores.file.record)[1])
