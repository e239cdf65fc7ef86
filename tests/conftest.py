"""What holds for every test: one thread, and no network.

The models of tests are so small that a second thread only waits, long where other tests run beside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports huggingface_hub, which reads it then.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch with one thread for the time of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
