"""The peak memory of a training step.

    PYTHONPATH=benchmarks python -m speed.memory SETTING METHOD        # the process of one method, which prints bytes

It is the growth of a process's resident memory over two steps (the second one has the optimizer's state),
after the model, the inputs and the optimizer were created. Each method has its own process. A step of a tiny model of
the same kind comes first, so that loading libraries does not count. Each tensor of more than 64 kB is a separate
mapping, which is returned when it is freed, so only live tensors count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peak import Peak

from speed.setting import Setting
from speed.steps import steps_of
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
    python_path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **SEPARATELY, "PYTHONPATH": python_path}
    arguments = ["-W", "ignore", "-m", "speed.memory", json.dumps(dataclasses.asdict(setting)), method]
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def take(setting: Setting, method: str) -> int:
    """How far two steps raise the peak over what the process had."""
    steps, left_out = steps_of(dataclasses.replace(setting, mode="training"), [method])
    if left_out:
        raise SystemExit(left_out[method])
    start = Peak()
    for _ in range(2):
        steps[method].run()
    return start.bytes() or 0


def main() -> None:
    """Print the bytes of one method."""
    setting, method = Setting(**json.loads(sys.argv[1])), sys.argv[2]
    take(dataclasses.replace(setting, workload="llama-64x1", size=1), method)
    print(take(setting, method))


if __name__ == "__main__":
    main()
