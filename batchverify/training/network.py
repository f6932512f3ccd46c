"""Network heads: a perceptron over pair features, its training and its checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from batchverify.errors import TrainingError
from batchverify.evaluation.figures import Curve
from batchverify.heads.features import Features
from batchverify.heads.scorer import Layer, Scorer
from batchverify.training.linear import moments
from batchverify.training.pairs import LabelledPairs

OVERFIT_PAIRS = 100
OVERFIT_STEPS = 300
OVERFIT_ACCURACY = 0.99
OVERFIT_RATE = 3e-3
RANGE_STEPS = 100
RANGE = (1e-6, 1.0)
EVALUATED = 8192
# Pairs that the means and spreads of the features are taken from.
SCALED_PAIRS = 16_384
# A smaller spread of a feature is rounding.
STEADY = 1e-6

# (a, b, labels): (B, F) float32 twice, (B,) float32.
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class NetworkSettings:
    """Shape and training of a network head; `options.TrainOptions` has the defaults.

    widths: of the hidden layers. max_lr: None for the learning-rate range test's pick. batch_pairs: None
    for one that suits the number of pairs. monitor: `loss`, `f1` or `auc`, on dev. snapshots: the best so
    many epochs become an ensemble.
    """

    widths: tuple[int, ...]
    dropout: float
    weight_decay: float
    epochs: int
    patience: int
    max_lr: float | None
    batch_pairs: int | None
    monitor: str
    snapshots: int
    seed: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the training pairs and what dev said after it; losses are binary cross-entropies."""

    epoch: int
    loss: float
    dev_loss: float
    dev_f1: float
    dev_auc: float
    lr: float
    seconds: float

    def merit(self, monitor: str) -> float:
        """How good the epoch is by `loss`, `f1` or `auc`: higher is better."""
        return {"loss": -self.dev_loss, "f1": self.dev_f1, "auc": self.dev_auc}[monitor]


@dataclass(frozen=True)
class RangeTest:
    """A learning-rate range test (Smith 2018): the loss of a step at each rate, and the rate it picks."""

    rates: list[float]
    losses: list[float]
    pick: float


@dataclass(frozen=True)
class NetworkFit:
    """What training made: one scorer a snapshot, best first, and how it went."""

    scorers: tuple[Scorer, ...]
    epochs: list[Epoch]
    best_epoch: int
    range_test: RangeTest | None
    max_lr: float


def fit_network(
    train: LabelledPairs,
    dev: LabelledPairs,
    features: Features,
    settings: NetworkSettings,
    report: Callable[[Epoch], None] = lambda epoch: None,
    *,
    checked: bool = False,
) -> NetworkFit:
    """Train with AdamW and one cycle of the learning rate (Smith 2018, arXiv 1803.09820).

    First the overfit check, unless `checked`, and the range test, unless a rate is given; then epochs until
    the best by `settings.monitor` is `patience` epochs old. Vectors stay in the table: memory is that of a
    batch. Raises `TrainingError` where the overfit check fails or the loss is not finite.
    """
    if not checked:
        overfit_check(train, features, settings)
    found, rate = None, settings.max_lr
    if rate is None:
        found = range_test(train, features, settings)
        rate = found.pick
    network = _build(train, features, settings)
    batch, rng = _batch_pairs(train, settings), np.random.default_rng(settings.seed)
    steps = settings.epochs * -(-len(train) // batch)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    epochs: list[Epoch] = []
    kept: list[tuple[Epoch, tuple[Layer, ...]]] = []
    for number in range(1, settings.epochs + 1):
        started, lr = time.perf_counter(), float(schedule.get_last_lr()[0])
        losses = []
        for a, b, labels in batches(train, features, batch, rng):
            losses.append(_step(network, optimiser, a, b, labels))
            schedule.step()
        epoch = _evaluate(network, dev, number, float(np.mean(losses)), lr, started)
        epochs.append(epoch)
        report(epoch)
        kept = sorted([*kept, (epoch, network.snapshot())], key=lambda each: -each[0].merit(settings.monitor))
        kept = kept[: settings.snapshots]
        if number - kept[0][0].epoch >= settings.patience:
            break
    scorers = tuple(Scorer("network", str(features), layers) for _, layers in kept)
    return NetworkFit(scorers, epochs, kept[0][0].epoch, found, rate)


def overfit_check(train: LabelledPairs, features: Features, settings: NetworkSettings) -> float:
    """Accuracy on a hundred training pairs learned by heart, dropout and weight decay off.

    Raises `TrainingError` below 99 %: what cannot be learned by heart cannot be learned.
    """
    pairs = train.draw(OVERFIT_PAIRS // 2, settings.seed)
    network = _build(pairs, features, settings).eval()
    optimiser = torch.optim.AdamW(network.parameters(), lr=OVERFIT_RATE, weight_decay=0)
    a, b, labels = pairs.take(np.arange(len(pairs)))
    accuracy = 0.0
    for _ in range(OVERFIT_STEPS):
        _step(network, optimiser, a, b, labels)
        with torch.no_grad():
            accuracy = float(((network(a, b) >= 0) == labels.bool()).float().mean())
        if accuracy >= OVERFIT_ACCURACY:
            return accuracy
    raise TrainingError(
        f"overfit check: {accuracy:.0%} of {len(pairs)} training pairs learned by heart in {OVERFIT_STEPS} "
        f"steps, dropout and weight decay off; {OVERFIT_ACCURACY:.0%} are needed. A network that cannot do "
        f"this cannot learn at all: look for pairs that stand there with both labels (`batchverify check`), "
        f"images that are all alike, features that cannot tell the pairs apart ({features}) or too small widths"
    )


def range_test(train: LabelledPairs, features: Features, settings: NetworkSettings) -> RangeTest:
    """Raise the rate from 1e-6 to 1 over a hundred steps; pick the one at which the smooth loss falls steepest.

    Ends early where the loss is four times its best. Source: Smith 2018, section 3.
    """
    network = _build(train, features, settings)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RANGE[0], weight_decay=settings.weight_decay)
    rng = np.random.default_rng(settings.seed)
    passes = repeat(_batch_pairs(train, settings))
    drawn = chain.from_iterable(batches(train, features, size, rng) for size in passes)
    rates: list[float] = []
    losses: list[float] = []
    smooth = best = float("inf")
    for rate, batch in zip(np.geomspace(*RANGE, RANGE_STEPS).tolist(), drawn, strict=False):
        optimiser.param_groups[0]["lr"] = rate
        loss = _step(network, optimiser, *batch)
        if not np.isfinite(loss):
            break
        smooth = loss if not rates else 0.8 * smooth + 0.2 * loss
        rates.append(rate)
        losses.append(smooth)
        best = min(best, smooth)
        if not smooth < 4 * best:
            break
    # Up to the smallest loss alone: after it the loss jumps about.
    falls = np.diff(losses[: int(np.argmin(losses)) + 1])
    return RangeTest(rates, losses, rates[int(np.argmin(falls))] if len(falls) else RANGE[0])


def _build(train: LabelledPairs, features: Features, settings: NetworkSettings) -> Perceptron:
    return Perceptron.fresh(train, features, settings.widths, settings.dropout, settings.seed)


def _batch_pairs(train: LabelledPairs, settings: NetworkSettings) -> int:
    return settings.batch_pairs or max(16, min(1024, len(train) // 16))


def _step(
    network: Perceptron,
    optimiser: torch.optim.Optimizer,
    a: torch.Tensor,
    b: torch.Tensor,
    labels: torch.Tensor,
) -> float:
    optimiser.zero_grad()
    loss = bce(network(a, b), labels)
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def _evaluate(
    network: Perceptron, dev: LabelledPairs, number: int, loss: float, lr: float, started: float
) -> Epoch:
    network.eval()
    with torch.no_grad():
        logits = torch.empty(len(dev))
        for block, (a, b, _) in zip(logits.split(EVALUATED), dev.blocks(EVALUATED), strict=True):
            block.copy_(network.scores(a, b))
        dev_loss = float(bce(logits, torch.from_numpy(dev.labels).float()))
        scores = torch.sigmoid(logits).numpy()
    network.train()
    if not np.isfinite(loss + dev_loss):
        raise TrainingError(f"training: the loss is not finite after epoch {number}; give a smaller --max-lr")
    curve = Curve.of(dev.labels, scores)
    return Epoch(number, loss, dev_loss, curve.best_f1()[0], curve.auc(), lr, time.perf_counter() - started)


class Perceptron(nn.Module):
    """Standardised features, then dropout, ReLU and linear layers down to one number."""

    def __init__(
        self,
        features: Features,
        mean: torch.Tensor,
        scale: torch.Tensor,
        widths: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.features, self.mean, self.scale = features, mean, scale
        layers: list[nn.Module] = []
        inputs = len(mean)
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    @classmethod
    def fresh(
        cls, train: LabelledPairs, features: Features, widths: Sequence[int], dropout: float, seed: int
    ) -> Perceptron:
        """One that has learned nothing but the means and spreads of its features; the seed decides its weights."""
        blocks = (_both_orders(features, *each) for each in train.draw(SCALED_PAIRS // 2, 0).blocks())
        _, mean, scale = moments(features(a, b).double() for a, b, _ in blocks)
        torch.manual_seed(seed)
        # What never varies here says nothing: divided by its spread, its smallest change would drown all else.
        scale = torch.where(scale > STEADY, scale, 1.0)
        return cls(features, mean.float(), scale.float(), widths, dropout)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Logits (B,) of pairs of (B, F) embeddings."""
        with torch.no_grad():
            values = (self.features(a, b) - self.mean) / self.scale
        return self.layers(values).squeeze(1)

    def scores(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Logits (B,) as the finished scorer gives them: of both orders where the features are not symmetric."""
        if self.features.symmetric:
            return self(a, b)
        return (self(a, b) + self(b, a)) / 2

    def snapshot(self) -> tuple[Layer, ...]:
        """The layers as arrays, with the standardisation folded into the first."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        found = [(each.weight.detach().clone(), each.bias.detach().clone()) for each in linear]
        weight, bias = found[0]
        weight = weight / self.scale
        found[0] = (weight, bias - weight @ self.mean)
        return tuple((weight.numpy(), bias.numpy()) for weight, bias in found)


def batches(train: LabelledPairs, features: Features, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One pass in random order; a pair stands there in both orders where the feature is not symmetric."""
    order = rng.permutation(len(train)).astype(np.int32)
    for start in range(0, len(order), size):
        yield _both_orders(features, *train.take(order[start : start + size]))


def _both_orders(features: Features, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> Batch:
    if features.symmetric:
        return a, b, labels
    return torch.cat([a, b]), torch.cat([b, a]), torch.cat([labels, labels])
