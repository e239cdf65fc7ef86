"""The process in which one method's memory is measured; prints bytes (see `memory.py`)."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys

from speed.setting import Setting
from speed.steps import steps_of

STEPS = 2
SMALL = {"llama": "llama-64x1"}


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def forget_the_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def take(setting: Setting, method: str, count: int) -> int:
    """How far so many steps raise the peak over what the process had."""
    # Plain training: `memory` says what is measured of it.
    steps, left_out = steps_of(dataclasses.replace(setting, mode="training"), [method])
    if left_out:
        raise SystemExit(left_out[method])
    step = steps[method]
    gc.collect()
    forget_the_peak()
    before = status("VmRSS")
    for _ in range(count):
        step.run(step.ready())
    return status("VmHWM") - before


def main() -> None:
    setting, method = Setting(**json.loads(sys.argv[1])), sys.argv[2]
    small = SMALL.get(setting.workload.partition("-")[0], setting.workload)
    take(dataclasses.replace(setting, workload=small, size=1), method, STEPS)
    print(take(setting, method, STEPS))


if __name__ == "__main__":
    main()
