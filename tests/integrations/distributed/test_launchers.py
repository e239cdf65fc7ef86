"""The example under launchers; by itself it runs in `tests/test_examples.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

#: Each starts several Python processes; `tests/test_examples.py` runs the same example without a launcher.
pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "usage" / "distributed.py"
# Their ports are whichever are free.
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def printed_under(*launcher: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(EXAMPLE)],
        **{"capture_output": True, "text": True, "timeout": 240, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_two_processes(printed: str) -> None:
    """Once, and not once for each process that was started."""
    assert printed.count("one group:") == printed.count("one group: ranks (0, 1) in 2 processes\n") == 1, printed
    assert "one process: 1.0308 -> 0.9964\n" in printed
    for wrapper in ("DDP", "FSDP2"):
        (difference,) = re.findall(rf"^{wrapper}, largest difference of a loss: (\S+)$", printed, re.MULTILINE)
        assert float(difference) < 1e-5
    assert "the file, loaded into a plain model: 0.0e+00\n" in printed
    assert "the shards, 4 of them, loaded again: 0.0e+00\n" in printed


@pytest.mark.parametrize("launcher", [TORCHRUN, [*ACCELERATE, "--multi_gpu"]], ids=["torchrun", "accelerate"])
def test_a_launcher_starts_two_processes(launcher: list[str]) -> None:
    printed = printed_under(*launcher)
    assert printed.startswith("started by a launcher\n"), printed
    check_two_processes(printed)


def test_accelerate_on_a_cpu_starts_one_process_and_the_example_two() -> None:
    """As docs/distributed.md says of it."""
    printed = printed_under(*ACCELERATE, "--cpu")
    assert printed.startswith("started by this program\n"), printed
    check_two_processes(printed)
