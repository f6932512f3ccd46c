"""Network heads: a perceptron on pair features, its checks and its training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
from batchverify.options import TrainOptions
from batchverify.training.learning_rate import RangeTest
from batchverify.training.linear import moments
from batchverify.training.pairs import LabelledPairs

OVERFIT_PAIRS = 100
OVERFIT_STEPS = 300
OVERFIT_ACCURACY = 0.99
OVERFIT_RATE = 3e-3
RANGE_STEPS = 100
RANGE = (1e-6, 1.0)
EVALUATION_BLOCK = 8192
# Pairs that the features are standardised by.
STANDARDISATION_PAIRS = 16_384
# A smaller spread of a feature is a rounding error.
LEAST_SPREAD = 1e-6

# (a, b, labels): (B, F) float32 twice, (B,) float32.
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# The options that shape and train a network. max_lr: None for the pick of the learning-rate range test. batch_pairs:
# None to choose it by the number of pairs. snapshots: number of best epochs that become an ensemble.
NETWORK_OPTIONS = (
    *("widths", "dropout", "weight_decay", "epochs", "patience"),
    *("max_lr", "batch_pairs", "monitor", "snapshots"),
)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training pairs and the metrics on dev after it; losses are binary cross-entropies."""

    epoch: int
    loss: float
    dev_loss: float
    dev_f1: float
    dev_auc: float
    lr: float
    seconds: float

    def merit(self, monitor: str) -> float:
        """The value of `monitor`, negated for `loss`: higher is better."""
        return {"loss": -self.dev_loss, "f1": self.dev_f1, "auc": self.dev_auc}[monitor]


@dataclass(frozen=True)
class NetworkFit:
    """A trained network: one scorer per snapshot, best first, and the course of the training."""

    scorers: tuple[Scorer, ...]
    epochs: list[Epoch]
    best_epoch: int
    range_test: RangeTest | None
    max_lr: float


def fit_network(
    train: LabelledPairs,
    dev: LabelledPairs,
    features: Features,
    options: TrainOptions,
    report: Callable[[Epoch], None] = lambda _: None,
    *,
    checked_lr: float | None = None,
) -> NetworkFit:
    """Train with AdamW and one cycle of the learning rate (Smith 2018, arXiv 1803.09820).

    Runs the overfit check, and the range test, unless a rate is given. Then trains until the best epoch by
    `options.monitor` is `patience` epochs old. Only the vectors of one batch are copied. checked_lr: the learning
    rate for which the checks have been made; None to make them. Raises `TrainingError` if the overfit check fails or
    the loss is not finite.
    """
    if checked_lr is None:
        overfit_check(train, features, options)
    tested, rate = None, options.max_lr if checked_lr is None else checked_lr
    if rate is None:
        tested = range_test(train, features, options)
        rate = tested.pick
    network = Perceptron(train, features, options)
    size, rng = _batch_pairs(train, options), np.random.default_rng(options.seed)
    steps = options.epochs * -(-len(train) // size)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    epochs: list[Epoch] = []
    best: list[tuple[Epoch, tuple[Layer, ...]]] = []
    for number in range(1, options.epochs + 1):
        started, lr = time.perf_counter(), float(schedule.get_last_lr()[0])
        losses = []
        for batch in batches(train, features, size, rng):
            losses.append(_step(network, optimiser, *batch))
            schedule.step()
        epoch = _evaluate(network, dev, number, float(np.mean(losses)), lr, started)
        epochs.append(epoch)
        report(epoch)
        best.append((epoch, network.snapshot()))
        best.sort(key=lambda snapshot: -snapshot[0].merit(options.monitor))
        del best[options.snapshots :]
        if number - best[0][0].epoch >= options.patience:
            break
    scorers = tuple(Scorer("network", str(features), layers) for _, layers in best)
    return NetworkFit(scorers, epochs, best[0][0].epoch, tested, rate)


def overfit_check(train: LabelledPairs, features: Features, options: TrainOptions) -> float:
    """Accuracy on a hundred memorised training pairs, without dropout and weight decay.

    Raises `TrainingError` below 99 %: a network that cannot memorise so few pairs cannot learn.
    """
    pairs = train.draw(OVERFIT_PAIRS // 2, options.seed)
    network = Perceptron(pairs, features, options).eval()
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
        f"overfit check: after {OVERFIT_STEPS} steps without dropout and weight decay the network has memorised "
        f"{accuracy:.0%} of {len(pairs)} training pairs, but {OVERFIT_ACCURACY:.0%} are needed. It cannot learn at "
        "all: look for pairs that appear with both labels (`batchverify check`), images that are all alike, "
        f"features that cannot tell the pairs apart ({features}), or too small widths"
    )


def range_test(train: LabelledPairs, features: Features, options: TrainOptions) -> RangeTest:
    """Raise the rate from 1e-6 to 1 over a hundred steps; see `RangeTest.run`."""
    network = Perceptron(train, features, options)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RANGE[0], weight_decay=options.weight_decay)
    rng = np.random.default_rng(options.seed)
    sizes = repeat(_batch_pairs(train, options))
    endless = chain.from_iterable(batches(train, features, size, rng) for size in sizes)

    def step(rate: float) -> float:
        optimiser.param_groups[0]["lr"] = rate
        return _step(network, optimiser, *next(endless))

    return RangeTest.run(step, np.geomspace(*RANGE, RANGE_STEPS).tolist())


def _batch_pairs(train: LabelledPairs, options: TrainOptions) -> int:
    return options.batch_pairs or max(16, min(1024, len(train) // 16))


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


def _evaluate(network: Perceptron, dev: LabelledPairs, number: int, loss: float, lr: float, started: float) -> Epoch:
    network.eval()
    with torch.no_grad():
        logits = torch.empty(len(dev))
        blocks = zip(logits.split(EVALUATION_BLOCK), dev.blocks(EVALUATION_BLOCK), strict=True)
        for block, (a, b, _) in blocks:
            block.copy_(network.scores(a, b))
        dev_loss = float(bce(logits, torch.from_numpy(dev.labels).float()))
        scores = torch.sigmoid(logits).numpy()
    network.train()
    if not np.isfinite(loss + dev_loss):
        raise TrainingError(f"training: the loss is not finite after epoch {number}; give a smaller --max-lr")
    curve = Curve.of(dev.labels, scores)
    return Epoch(number, loss, dev_loss, curve.best_f1()[0], curve.auc(), lr, time.perf_counter() - started)


class Perceptron(nn.Module):
    """Standardised features, then linear layers with ReLU and dropout between them, to one logit.

    The features are standardised by the training pairs; the weights are random, by the options' seed.
    """

    def __init__(self, train: LabelledPairs, features: Features, options: TrainOptions) -> None:
        super().__init__()
        blocks = train.draw(STANDARDISATION_PAIRS // 2, 0).blocks()
        ordered = (_both_orders(features, *block) for block in blocks)
        _, mean, scale = moments(features(a, b).double() for a, b, _ in ordered)
        torch.manual_seed(options.seed)
        # A constant feature is not divided by its spread: its smallest change would outweigh all others.
        scale = torch.where(scale > LEAST_SPREAD, scale, 1.0)
        self.features, self.mean, self.scale = features, mean.float(), scale.float()
        layers: list[nn.Module] = []
        inputs = len(mean)
        for width in options.widths:
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(options.dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Logits (B,) of pairs of (B, F) embeddings."""
        with torch.no_grad():
            values = (self.features(a, b) - self.mean) / self.scale
        return self.layers(values).squeeze(1)

    def scores(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Logits (B,) as the scorer gives them: the mean of both orders if the features are not symmetric."""
        if self.features.symmetric:
            return self(a, b)
        return (self(a, b) + self(b, a)) / 2

    def snapshot(self) -> tuple[Layer, ...]:
        """The layers as arrays, with the standardisation folded into the first one."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        layers = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linear]
        weight, bias = layers[0]
        weight = weight / self.scale
        layers[0] = (weight, bias - weight @ self.mean)
        return tuple((weight.numpy(), bias.numpy()) for weight, bias in layers)


def batches(train: LabelledPairs, features: Features, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One pass in random order; each pair comes in both orders if the features are not symmetric."""
    order = rng.permutation(len(train)).astype(np.int32)
    for start in range(0, len(order), size):
        yield _both_orders(features, *train.take(order[start : start + size]))


def _both_orders(features: Features, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> Batch:
    if features.symmetric:
        return a, b, labels
    return torch.cat([a, b]), torch.cat([b, a]), torch.cat([labels, labels])
