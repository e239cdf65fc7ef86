"""Settings for all tests: one seed, one thread, no network, and the default action of SIGINT."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# huggingface_hub and onnxruntime read them when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from browser import NAMES, find_browser

#: It registers operators, which torch refuses a second time: pytest would import it once more, to look for doctests.
collect_ignore = ["support/second_device.py", "layers/quantized/with_gptqmodel.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test by itself and after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch with one thread: more are slower for models as small as those of the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def default_sigint() -> Iterator[None]:
    """Handle SIGINT as Python does by default, here and in subprocesses.

    A shell starts background jobs with SIGINT ignored, and Python then installs no handler of its own.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a clear notice if the HTML page was not tested."""
    if find_browser() is None:
        terminalreporter.section("the HTML page was NOT tested", sep="!", red=True, bold=True)
        terminalreporter.line(f"tests/view/html needs one of {', '.join(NAMES)}, and none is installed.")
        terminalreporter.line("On Debian and Ubuntu: sudo apt-get install chromium")
