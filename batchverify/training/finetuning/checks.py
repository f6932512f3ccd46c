"""What is found out before a training: whether the network can learn at all, and how fast it should."""

from __future__ import annotations

import math
from itertools import cycle, islice

import numpy as np
import torch
from torch.nn.functional import normalize

from batchverify.errors import TrainingError
from batchverify.evaluation.figures import Curve
from batchverify.options import FinetuneOptions
from batchverify.training.finetuning.learner import Learner, set_rate
from batchverify.training.finetuning.sets import (
    IMAGES_PER_PERSON,
    Batch,
    Batches,
    PairBatches,
    pair_batch,
    people_batch,
)
from batchverify.training.finetuning.vectors import Stored, cosines_of, of_batch
from batchverify.training.learning_rate import RangeTest

# The overfit check: pairs of each label, or people; steps, their rate, and when the check has passed.
OVERFIT_PAIRS, OVERFIT_PEOPLE = 16, 8
OVERFIT_STEPS, OVERFIT_RATE = 100, 1e-3
OVERFIT_AUC, OVERFIT_LOSS = 0.99, 0.5
# Below this a loss leaves nothing to learn.
NO_LOSS = 1e-3
# The range test.
RANGE_STEPS, RANGE = 60, (1e-6, 1e-1)
RANGE_BATCHES = 8


def overfit_check(learner: Learner, train: Stored, batches: Batches, options: FinetuneOptions) -> None:
    """Memorise a few pairs, or a few people, without dropout and weight decay; the learner is left changed.

    They are memorised when their cosines have an AUC of .99 and same and different pairs are further apart than at
    the start; with distillation alone, when the loss is half of that at the start. Raises `TrainingError` otherwise:
    a network that cannot memorise so few cannot learn.
    """
    batch = _few(batches, options)
    device = next(learner.parameters()).device
    values = of_batch(train, batch, device)
    optimiser = learner.eval().optimiser(options, weight_decay=0.0)
    set_rate(optimiser, OVERFIT_RATE)
    first_loss = first_gap = auc = math.nan
    for step in range(OVERFIT_STEPS + 1):
        optimiser.zero_grad()
        vectors = learner.vectors(values)
        loss = learner.loss(vectors, batch)
        value = finite(float(loss.detach()), "overfit check")
        auc, gap = _separation(vectors, batch)
        if step == 0:
            first_loss, first_gap = value, gap
        is_learnt = auc >= OVERFIT_AUC and (gap > first_gap or value == 0)
        if options.loss == "distillation":
            is_learnt = value <= max(OVERFIT_LOSS * first_loss, NO_LOSS)
        if is_learnt:
            return
        loss.backward()
        optimiser.step()
    reached = f"an AUC of {auc:.3f} on {len(batch.labels)} training pairs, but {OVERFIT_AUC} is needed"
    if options.loss == "distillation":
        reached = f"a loss of {value:.3g} from {first_loss:.3g} on {len(batch)} images, but half is needed"
    raise TrainingError(
        f"overfit check: after {OVERFIT_STEPS} steps without dropout and weight decay the network has reached "
        f"{reached}. It cannot learn at all: look for pairs that appear with both labels (`batchverify check`), "
        "images that are all alike, or unfreeze more blocks"
    )


def range_test(learner: Learner, train: Stored, batches: Batches, options: FinetuneOptions) -> RangeTest:
    """The range test from 1e-6 to .1 over sixty steps; the learner is left changed.

    Few batches take turns, and a loss counts by what it was for the same batch before the first step: batches differ
    more in their losses than a step changes one. Raises `TrainingError` if the first loss is not finite.
    """
    device = next(learner.parameters()).device
    few = list(islice(batches.epoch(0, train.views), RANGE_BATCHES))
    optimiser = learner.train().optimiser(options)
    with torch.no_grad():
        before = [float(learner(of_batch(train, batch, device), batch)) for batch in few]
    level = finite(float(np.mean(before)), "learning-rate range test")
    turns = cycle(range(len(few)))

    def step(rate: float) -> float:
        turn = next(turns)
        set_rate(optimiser, rate)
        optimiser.zero_grad()
        loss = learner(of_batch(train, few[turn], device), few[turn])
        loss.backward()
        optimiser.step()
        return float(loss.detach()) * (level / before[turn] if before[turn] else 1.0)

    return RangeTest.run(step, np.geomspace(*RANGE, RANGE_STEPS).tolist())


def finite(loss: float, where: str) -> float:
    """A loss as it is. Raises `TrainingError` if it is not finite."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"{where}: the loss is not finite; give a smaller --max-lr, or --dtype float32, or look for images whose "
            "activations are not finite"
        )
    return loss


def _few(batches: Batches, options: FinetuneOptions) -> Batch:
    if isinstance(batches, PairBatches):
        pairs = batches.pairs.few(min(OVERFIT_PAIRS, options.batch_images // 4), options.seed)
        return pair_batch(pairs, np.arange(len(pairs)))
    rng = np.random.default_rng(options.seed)
    # Those with several images first.
    shuffled = [batches.members[person] for person in rng.permutation(len(batches.members))]
    shuffled.sort(key=lambda images: len(images) < 2)
    most = max(2, min(OVERFIT_PEOPLE, options.batch_images // IMAGES_PER_PERSON))
    chosen = [images[:IMAGES_PER_PERSON] for images in shuffled[:most]]
    return people_batch(np.concatenate(chosen), batches.identities)


def _separation(vectors: torch.Tensor, batch: Batch) -> tuple[float, float]:
    """AUC of the batch's pairs, and the mean cosine of same pairs less that of different ones."""
    units = normalize(vectors.detach()).cpu().numpy()
    cosines = cosines_of(units, batch)
    same = batch.labels == 0
    if not np.isfinite(cosines).all():
        return math.nan, math.nan
    return Curve.of(batch.labels, -cosines).auc(), float(cosines[same].mean() - cosines[~same].mean())
