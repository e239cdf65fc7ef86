"""How many kernels a step launches on a GPU, as torch's profiler counts them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from speed.timing import Measured, Step, reason

#: Calls of CUDA's runtime and driver: cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernel, cuLaunchKernelEx.
_LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel")


def launches(step: Step) -> float:
    """Of one step, which was run before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step.run(step.ready())
    return float(counted(profiler.key_averages()))


def counted(events: Iterable[Any]) -> int:
    """Of the profiler's averages, each with its `key` and `count`."""
    return sum(event.count for event in events if _LAUNCH.match(event.key))


def all_launches(steps: dict[str, Step]) -> Measured:
    """Kernels, by method."""
    measured = Measured()
    for key, step in steps.items():
        try:
            for _ in range(2):
                step.run(step.ready())
            measured.values[key] = [launches(step)]
        except Exception as error:
            measured.left_out[key] = reason(error)
    return measured
