"""Settings for all tests: one seed, one thread, no network, and the default action of SIGINT."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

# huggingface_hub and onnxruntime read them when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from packaging.requirements import Requirement

#: Files that newer releases are needed for. A single test that needs a newer release has the marker `needs`.
NEEDS = {
    "export": "torch>=2.9",
    "tracing/test_captured.py": "torch>=2.9",
    "tracing/test_graph_is_eager.py": "torch>=2.9",
    "tracing/test_graphs.py": "torch>=2.9",
    "tracing/test_refused.py": "torch>=2.9",
    "layers/test_experts.py": "transformers>=5.6",
    "layers/quantized": "torchao>=0.18",
    "model/test_waits_and_memory.py": "torchao>=0.18",
    "selection/test_parameters_and_ranks.py": "transformers>=5.6",
    "selection/test_selection_like_peft.py": "peft>=0.21",
}


def runs_here(requirement: str) -> bool:
    """Whether the installed release of a library is one of those in a requirement."""
    need = Requirement(requirement)
    try:
        return need.specifier.contains(version(need.name), prereleases=True)
    except PackageNotFoundError:
        return False


LEFT_OUT = [place for place, need in NEEDS.items() if not runs_here(need)]
#: The first one registers operators, which torch refuses a second time: pytest would import it once more for doctests.
collect_ignore = ["support/second_device.py", *LEFT_OUT]
#: A folder that is given on the command line is not ignored itself.
collect_ignore_glob = [f"{place}/*" for place in LEFT_OUT]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need newer releases than the installed ones."""
    unmet = [
        item for item in items if any(not runs_here(text) for mark in item.iter_markers("needs") for text in mark.args)
    ]
    config.hook.pytest_deselected(items=unmet)
    items[:] = [item for item in items if item not in unmet]


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
    """Print which files need newer releases."""
    for place in LEFT_OUT:
        terminalreporter.line(f"tests/{place} needs {NEEDS[place]}")
