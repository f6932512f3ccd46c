"""torch with one CPU: in small batches and layers, threads that wait for each other cost more than they bring."""

from collections.abc import Iterator

import torch


def one_torch_thread() -> Iterator[None]:
    """The body of a fixture."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
