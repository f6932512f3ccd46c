"""The backbone alone, images/s: `python benchmarks/embed.py [ROOT] [--synthetic N] [--device D] [--append]`.

Ours beside facenet-pytorch's eager model (float32, batches of 1 and of 32; on a GPU larger ones, too) and beside the
machine's own matrix products in the number format that ours computes in, as images of 2.835 GFLOP. The same faces for
all.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faces
import numpy as np
import torch
from results import publish, table

from batchverify.backbones import build_network, load_backbone
from batchverify.crops import whole_face
from batchverify.devices import resolve_device
from batchverify.embedder import Embedder
from batchverify.engine import Workers, available_cpus, visible_gpus
from batchverify.memory import keep_freed_memory

GFLOP = 2.835
SIDE = {"cpu": 4096, "cuda": 8192}
# Products before a GPU is waited for: what lies between them would count as its slowness.
QUEUED = {"cpu": 1, "cuda": 20}
PEER_BATCHES = {"cpu": (1, 32), "cuda": (1, 32, 128, 256, 512)}
SECONDS = 5.0


def ours(embedder: Embedder, pixels: np.ndarray, workers: Workers) -> Callable[[], int]:
    """All faces once, in chunks, on the workers of the local engine."""
    chunks = [pixels[start : start + workers.chunk] for start in range(0, len(pixels), workers.chunk)]
    pool = ThreadPoolExecutor(workers.count, initializer=lambda: torch.set_num_threads(workers.threads))

    def run() -> int:
        list(pool.map(embedder.vectors, chunks))
        return len(pixels)

    return run


def peer(pixels: np.ndarray, batch: int, device: str) -> Callable[[], int]:
    """facenet-pytorch's model as its examples use it, on as many faces as some seconds allow."""
    network = build_network(load_backbone("vggface2")).to(device)
    count = min(len(pixels), 64 if batch == 1 else max(512, 4 * batch))

    @torch.inference_mode()
    def run() -> int:
        for start in range(0, count, batch):
            inputs = torch.from_numpy(pixels[start : start + batch]).to(device).permute(0, 3, 1, 2)
            torch.nn.functional.normalize(network((inputs.float() - 127.5) / 128)).cpu()
        return count

    return run


def products(dtype: torch.dtype, device: str, workers: Workers) -> Callable[[], int]:
    """Square matrix products counted as images: side by side on a CPU's threads, one after the other on a GPU."""
    kind = device.partition(":")[0]
    side, queued = SIDE[kind], QUEUED[kind]
    count = workers.count if kind == "cpu" else 1
    sides = [torch.randn(2, side, side).to(device, dtype) for _ in range(count)]
    pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(workers.threads))

    @torch.inference_mode()
    def multiply(pair: torch.Tensor) -> None:
        for _ in range(queued):
            pair[0] @ pair[1]
        if kind != "cpu":
            torch.cuda.synchronize()

    def run() -> int:
        list(pool.map(multiply, sides))
        return round(count * queued * 2 * side**3 / GFLOP / 1e9)

    return run


def rate(work: Callable[[], int]) -> float:
    """Images a second: the best of rounds that take some seconds together, after one to warm up."""
    work()
    rates, begun = [], time.perf_counter()
    while not rates or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        rates.append(work() / (time.perf_counter() - started))
    return max(rates)


@faces.image_options
def main(root: Path | None, synthetic: int | None, device: str, append: bool) -> None:
    """Print the table."""
    command = faces.command_line("embed.py", root, synthetic, device)
    pixels = np.stack([whole_face(each).pixels for each in faces.pictures(root, synthetic)])
    device = resolve_device(device)
    workers = Workers.for_cpus(available_cpus(), visible_gpus(device))
    torch.set_num_threads(available_cpus())
    # Before our own processes' ways with memory and TF32 are set: they would serve and slow the peer, too.
    kind = device.partition(":")[0]
    peers = {batch: rate(peer(pixels, batch, device)) for batch in PEER_BATCHES[kind]}
    keep_freed_memory()
    embedder = Embedder(crop="none", device=device)
    mine = rate(ours(embedder, pixels, workers))
    dtype = embedder._dtype
    ceiling = rate(products(dtype, device, workers))
    rows = [[f"ours ({embedder.compute_path})", f"{mine:.1f}", "1.00"]]
    rows += [
        [f"facenet-pytorch eager float32, batches of {batch}", f"{each:.1f}", f"{mine / each:.2f}"]
        for batch, each in peers.items()
    ]
    name = str(dtype).removeprefix("torch.")
    rows.append([f"matrix products alone ({name}, {SIDE[kind]}³)", f"{ceiling:.1f}", f"{mine / ceiling:.2f}"])
    body = table([f"backbone alone, {len(pixels):,} faces", "images/s", "ours / it"], rows)
    publish("Embed only", command, body, append=append)


if __name__ == "__main__":
    main()
