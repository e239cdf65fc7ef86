"""Whether adapted layers are right on a CUDA device, and then the time and memory of steps in bfloat16.

    PYTHONPATH=.:benchmarks python -m gpu              # or: make bench-gpu PYTHON=python
    PYTHONPATH=.:benchmarks python -m gpu --smoke      # the same on a CPU, as small as it can be

Prints Markdown: the machine, a line for each checked layer, and the table of `speed`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence

import torch
from speed.environment import versions
from speed.grid import STEPS
from speed.results import Cell
from speed.running import quiet
from speed.setting import Setting
from speed.steps import steps_of
from speed.table import table
from speed.timing import Budget, Measured, Step, clocked, interleave

from gpu.correctness import correctness

METHODS = ("base", "base-again", "lora", "peft-hra", "ours", "ours-gs")


def measured(workload: str, device: str, sizes: Sequence[int], budget: Budget) -> Iterator[Cell]:
    """Times of steps, and on CUDA the peak memory of two training steps over what was allocated before."""
    for mode in STEPS:
        for size in sizes:
            setting = Setting(workload, mode, size, "bfloat16", device=device)
            steps, left_out = steps_of(setting, METHODS)
            times = interleave(steps, budget, clocked)
            yield Cell(setting, Measured(times.values, left_out | times.left_out))
            if mode == "training" and device == "cuda":
                peaks: dict[str, list[float | None]] = {key: [peak(step)] for key, step in steps.items()}
                yield Cell(dataclasses.replace(setting, mode="memory"), Measured(peaks, left_out))


def peak(step: Step) -> float:
    """Bytes that two runs of a step need at most, beyond what is allocated before them."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step.run()
    return float(torch.cuda.max_memory_allocated() - before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 without CUDA or if a result is wrong, and 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    smoke = parser.parse_args(arguments).smoke
    if not smoke and not torch.cuda.is_available():
        print("torch sees no CUDA device, so nothing was measured; --smoke runs on the CPU.", file=sys.stderr)
        return 1
    torch.backends.cudnn.allow_tf32 = False
    device, width, channels = ("cpu", 64, 8) if smoke else ("cuda", 2048, 128)
    print(
        f"{versions()}{'' if smoke else f' {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}.'}\n", flush=True
    )
    right = True
    for words, holds in correctness(device, width, channels):
        print(f"- {'right' if holds else '**WRONG**'}: {words}", flush=True)
        right &= holds
    if not right:
        return 1
    with quiet():
        workload, sizes = ("llama-64x1", [4]) if smoke else ("llama-2048x8", [1, 128, 512, 2048])
        cells = list(measured(workload, device, sizes, Budget(0, least=2) if smoke else Budget(20)))
    print("", *table(cells), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
