"""The peak memory of a training step.

It is the growth of a process's resident memory over two steps (the second one has the optimizer's state),
after the model, the inputs and the optimizer were created. Each method has its own process. Linux keeps the peak
(`VmHWM` in /proc/self/status), and resets it when 5 is written to /proc/self/clear_refs. A step of a tiny model of the
same kind comes first, so that loading libraries does not count. Each tensor of more than 64 kB is a separate mapping,
which is returned when it is freed, so only live tensors count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from speed.setting import Setting
from speed.timing import Measured

LARGE = str(1 << 16)
SEPARATELY = {"MALLOC_MMAP_THRESHOLD_": LARGE, "MALLOC_TRIM_THRESHOLD_": LARGE, "MALLOC_MMAP_MAX_": "1000000"}
FOLDER = Path(__file__).resolve().parents[1]


def peaks(setting: Setting, methods: Sequence[str], rounds: int) -> Measured:
    """Bytes, by method and process; the processes of a round run one after another."""
    measured = Measured()
    for _ in range(rounds):
        for key in methods:
            if key not in measured.left_out:
                try:
                    measured.values.setdefault(key, []).append(peak(setting, key))
                except subprocess.CalledProcessError as error:
                    measured.left_out[key] = (error.stderr.strip().splitlines() or ["it ended"])[-1][:160]
                    measured.values.pop(key, None)
    return measured


def peak(setting: Setting, method: str) -> float:
    """Bytes of one method, in a process of its own."""
    return last_number("-m", "speed.memory_of_one", json.dumps(dataclasses.asdict(setting)), method)


def last_number(*arguments: str) -> float:
    """The last number that a new process of Python prints; in it, memory that is freed goes back to the system."""
    python_path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **SEPARATELY, "PYTHONPATH": python_path}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])
