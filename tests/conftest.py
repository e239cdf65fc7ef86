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
from browser import NAMES, find_browser


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch with one thread for the time of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it loudly where the page was not tested."""
    if find_browser() is None:
        terminalreporter.section("the HTML page was NOT tested", sep="!", red=True, bold=True)
        terminalreporter.line(f"tests/view/html needs one of {', '.join(NAMES)}, and none is installed.")
        terminalreporter.line("On Debian and Ubuntu: sudo apt-get install chromium")
