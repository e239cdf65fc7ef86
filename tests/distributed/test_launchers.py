"""The example under a launcher; by itself it runs in `tests/test_examples.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "usage" / "distributed.py"


def test_accelerate_launch() -> None:
    # Port 0: whichever is free. torchrun is the launcher below.
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(EXAMPLE)],
        **{"capture_output": True, "text": True, "timeout": 240, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
    )
    assert done.returncode == 0, done.stderr
    assert "one process: 1.0308 -> 0.9964" in done.stdout
    assert "the shards, 4 of them, loaded again: 0.0e+00" in done.stdout
