"""Features and head on embeddings in memory, pairs/s: `python benchmarks/pairs.py [--pairs N] [--record]`.

For each kind of head: ours (the run's way: one thread a worker, a chunk of pairs each), a plain torch loop of the
same head at its best batch of three (torch's own threads), and the head's matrix products alone. Random unit
vectors, so no data is needed.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import click
import numpy as np
import torch
from results import publish, table

from batchverify.heads.features import Features
from batchverify.heads.head import Head
from batchverify.heads.scorer import Scorer
from batchverify.runtime.devices import available_cpus

IMAGES = 20_000
DIMENSION = 512
CHUNK = 65_536
PLAIN_BATCHES = (256, 1024, 4096)
ROUNDS = 3
KINDS = {
    "default (distance:chi2sum)": ("chi2sum", ()),
    "distance:cosine": ("cosine", ()),
    "linear, chi2": ("chi2", ()),
    "linear, product": ("product", ()),
    "linear, concat": ("concat", ()),
    "network 640-64, absdiff": ("absdiff", (640, 64)),
    "network 1024-128, chi2+product": ("chi2+product", (1024, 128)),
}
HEADER = [
    "head",
    "ours, pairs/s",
    "plain torch loop",
    "ours / plain",
    "matrix products alone",
    "ours / products",
]


def build(features: str, widths: tuple[int, ...]) -> Head:
    """A head of random weights."""
    rng = np.random.default_rng(0)
    sizes = [Features.parse(features).width(DIMENSION), *widths, 1]
    layers = tuple(
        ((rng.normal(size=(out, into)) / into**0.5).astype(np.float32), np.zeros(out, np.float32))
        for into, out in pairwise(sizes)
    )
    about = {"embedding": {"dimension": DIMENSION}}
    return Head((Scorer("benchmark", features, layers),), about=about)


def ours(head: Head, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Chunks of pairs on as many threads as there are CPUs, as the local engine runs them."""
    starts = range(0, len(a), CHUNK)
    with ThreadPoolExecutor(available_cpus(), initializer=lambda: torch.set_num_threads(1)) as pool:
        list(pool.map(lambda at: head.score_pairs(vectors, a[at : at + CHUNK], b[at : at + CHUNK]), starts))


@torch.inference_mode()
def plain(head: Head, vectors: np.ndarray, a: np.ndarray, b: np.ndarray, batch: int) -> None:
    """What one writes without thinking of speed: gather, features, layers, sigmoid, cosine."""
    scorer, table_of = head.scorers[0], torch.from_numpy(vectors)
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    layers = [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in scorer.layers]
    for start in range(0, len(a), batch):
        x = table_of[first[start : start + batch]].float()
        y = table_of[second[start : start + batch]].float()
        values = plain_features(scorer.features, x, y)
        for weight, bias in layers[:-1]:
            values = torch.relu(torch.nn.functional.linear(values, weight, bias))
        torch.sigmoid(torch.nn.functional.linear(values, *layers[-1])), (x * y).sum(1)


def plain_features(names: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The features as their formulas read."""

    def chi2() -> torch.Tensor:
        return (x - y) ** 2 / (x.abs() + y.abs() + 1e-6)

    formulas: dict[str, Callable[[], torch.Tensor]] = {
        "chi2": chi2,
        "chi2sum": lambda: chi2().sum(1, keepdim=True),
        "cosine": lambda: (x * y).sum(1, keepdim=True),
        "product": lambda: x * y,
        "absdiff": lambda: (x - y).abs(),
        "concat": lambda: torch.cat([x, y], 1),
    }
    return torch.cat([formulas[name]() for name in names.split("+")], 1)


@torch.inference_mode()
def products(head: Head, pairs: int) -> None:
    """The layers alone, on rows that are there already."""
    layers = [torch.from_numpy(weight) for weight, _ in head.scorers[0].layers]
    rows = torch.randn(4096, layers[0].shape[1])
    for _ in range(0, pairs, 4096):
        values = rows
        for weight in layers:
            values = values @ weight.T


def rate(pairs: int, work: Callable[[], None]) -> float:
    """Pairs a second, the best of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return pairs / min(seconds)


@click.command()
@click.option("--pairs", default=1_000_000, show_default=True, help="Pairs to score, each round.")
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
def main(pairs: int, record: bool) -> None:
    """Print the table."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(IMAGES, DIMENSION))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    torch.set_num_threads(available_cpus())
    rows = []
    for name, (features, widths) in KINDS.items():
        count = pairs if not widths else pairs // 5
        a, b = rng.integers(0, IMAGES, (2, count))
        head = build(features, widths)
        mine = rate(count, lambda: ours(head, vectors, a, b))  # noqa: B023
        loops = [rate(count, lambda: plain(head, vectors, a, b, size)) for size in PLAIN_BATCHES]  # noqa: B023
        alone = rate(count, lambda: products(head, count))  # noqa: B023
        cells = [name, f"{mine:,.0f}", f"{max(loops):,.0f}", f"{mine / max(loops):.2f}"]
        rows.append([*cells, f"{alone:,.0f}", f"{mine / alone:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    command = f"python benchmarks/pairs.py --pairs {pairs}"
    publish("Features and head", command, table(HEADER, rows), record=record)


if __name__ == "__main__":
    main()
