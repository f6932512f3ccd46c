"""Small batches: more threads would wait for each other, for seconds where other work runs."""

import pytest
from torch_threads import one_torch_thread

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
