"""The peak of a training step's memory.

On a CPU each method has a process of its own: how far its resident memory grows over two steps, the second of which has
the optimizer's state too, beyond what it was when model, inputs and optimizer were ready. The kernel keeps the largest
(`VmHWM` in /proc/self/status), and forgets it on a word (5 to /proc/self/clear_refs). A step of a tiny model of the
same kind comes before, so that loading libraries does not count; and each tensor of more than 64 kB is a mapping of its
own, so that what is freed goes back to the kernel at once, and the figure is that of tensors alive.

On a GPU it is `torch.cuda.max_memory_allocated` over two steps, beyond what was allocated before them.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from speed.setting import Setting
from speed.timing import Measured, Step, reason

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
    wanted = json.dumps(dataclasses.asdict(setting))
    python_path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **SEPARATELY, "PYTHONPATH": python_path}
    command = [sys.executable, "-W", "ignore", "-m", "speed.memory_of_one", wanted, method]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def peak_on_cuda(step: Step) -> float:
    """Bytes of a step's first two runs."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step.run(step.ready())
    return float(torch.cuda.max_memory_allocated() - before)


def peaks_on_cuda(steps: dict[str, Step]) -> Measured:
    """Bytes, by method."""
    measured = Measured()
    # The base, which keeps nothing from step to step: what libraries allocate for good counts for nobody.
    for step in list(steps.values())[:1]:
        step.run(step.ready())
    for key, step in steps.items():
        try:
            measured.values[key] = [peak_on_cuda(step)]
        except Exception as error:
            measured.left_out[key] = reason(error)
    return measured
