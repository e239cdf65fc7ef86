"""The process in which one method's memory is measured; prints bytes (see `memory.py`)."""

from __future__ import annotations

import dataclasses
import json
import sys

from peak import Peak

from speed.setting import Setting
from speed.steps import steps_of

STEPS = 2
SMALL = {"llama": "llama-64x1"}


def take(setting: Setting, method: str, count: int) -> int:
    """How far so many steps raise the peak over what the process had."""
    # Plain training: `memory` says what is measured of it.
    steps, left_out = steps_of(dataclasses.replace(setting, mode="training"), [method])
    if left_out:
        raise SystemExit(left_out[method])
    step, peak = steps[method], Peak()
    for _ in range(count):
        step.run(step.ready())
    return peak.bytes() or 0


def main() -> None:
    setting, method = Setting(**json.loads(sys.argv[1])), sys.argv[2]
    small = SMALL.get(setting.workload.partition("-")[0], setting.workload)
    take(dataclasses.replace(setting, workload=small, size=1), method, STEPS)
    print(take(setting, method, STEPS))


if __name__ == "__main__":
    main()
