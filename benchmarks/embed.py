"""The backbone alone, images/s: `python benchmarks/embed.py [ROOT] [--synthetic N] [--device D] [--beside CHECKOUT]`.

Every path that this machine has beside facenet-pytorch's eager model (float32, batches of 1 and of 32; on a GPU
larger ones, too), the machine's own matrix products as images of 2.835 GFLOP, and with `--beside` another checkout of
this project. The same faces for all, two turns each, of which the better one counts.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faces
import numpy as np
import torch
from facenet import eager_network
from path_rate import Way, measured, rate
from results import publish, table

from batchverify.engine.base import Workers, visible_gpus
from batchverify.faces.crops import fixed_face
from batchverify.runtime.compiled_network import capabilities
from batchverify.runtime.devices import available_cpus, cpu_has_bf16, resolve_device

GFLOP = 2.835
SIDE = {"cpu": 4096, "cuda": 8192}
# Products before a GPU is waited for: what lies between them would count as its slowness.
QUEUED = {"cpu": 1, "cuda": 20}
PEER_BATCHES = {"cpu": (1, 32), "cuda": (1, 32, 128, 256, 512)}
TURNS = 2
# Enough for every worker to have several chunks; slow paths take a minute a turn.
MOST_FACES = 1024


def ways(device: str, beside: Path | None) -> list[Way]:
    """Every way that a device has of computing the backbone."""
    if device != "cpu":
        return [Way("torch", {"device": device})]
    numbers = ["int8", *(["bfloat16"] if "BF16" in capabilities() else []), "float32"]
    found = [Way(f"OpenVINO {each}", {"device": device, "dtype": each}) for each in numbers]
    plain = ["bfloat16", "float32"] if cpu_has_bf16() else ["float32"]
    found += [Way(f"torch {each}", {"device": device, "runtime": "torch", "dtype": each}) for each in plain]
    return found + ([Way(f"{beside.name}, another checkout", {"device": device}, beside)] if beside else [])


def peer(pixels: np.ndarray, batch: int, device: str) -> Callable[[], int]:
    """facenet-pytorch's model as its examples use it, on as many faces as some seconds allow."""
    network = eager_network().to(device)
    count = min(len(pixels), 64 if batch == 1 else max(256, 4 * batch))

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


@faces.image_options
def main(root: Path | None, synthetic: int | None, device: str, beside: Path | None, record: bool) -> None:
    """Print the table."""
    command = faces.command_line("embed.py", root, synthetic, device, beside)
    images = [fixed_face(each, "none").pixels for each in faces.pictures(root, synthetic)[:MOST_FACES]]
    device = resolve_device(device)
    kind = device.partition(":")[0]
    workers = Workers.for_cpus(available_cpus(), visible_gpus(device))
    torch.set_num_threads(available_cpus())
    rows: dict[str, float] = {}
    for _ in range(TURNS):
        for way in ways(device, beside):
            found = measured("embed", images, way)
            name = f"{way.name} ({found.path})"
            rows[name] = max(rows.get(name, 0.0), found.rate)
        for batch in PEER_BATCHES[kind]:
            name = f"facenet-pytorch eager float32, batches of {batch}"
            rows[name] = max(rows.get(name, 0.0), rate(peer(np.stack(images), batch, device)))
        dtype = torch.bfloat16 if kind == "cuda" or cpu_has_bf16() else torch.float32
        name = f"matrix products alone ({str(dtype).removeprefix('torch.')}, {SIDE[kind]}³)"
        rows[name] = max(rows.get(name, 0.0), rate(products(dtype, device, workers)))
    eager = next(value for name, value in rows.items() if name.endswith("batches of 32"))
    lines = [[name, f"{value:.1f}", f"{value / eager:.2f}"] for name, value in rows.items()]
    body = table([f"backbone alone, {len(images):,} faces", "images/s", "of eager, batches of 32"], lines)
    publish("Embed only", command, body, record=record)


if __name__ == "__main__":
    main()
