"""docs/benchmarks_gpu.md: the machine, the checks, and all tables."""

from __future__ import annotations

from collections.abc import Iterator

from speed.launch_table import table
from speed.models import WORKLOADS
from speed.table import tables

from gpu.report import Report

NOTES = """\
Written by `make bench-gpu`; do not edit. Ratios are medians over rounds in one process: in each round every method
takes one step, in random order, after a warm-up step of the same model. Columns without a unit are relative to the
first method. Training is forward, backward and AdamW; the frozen base runs the backward down to the output of its
first layer. Adapted layers: q, k, v, gate and up of the Llama, all Linear layers of the ViT, the 3x3 convolutions of
the ResNet blocks. Weights are random; adapters are float32. TF32 is off. Memory is
`torch.cuda.max_memory_allocated` over two training steps, minus the memory that was allocated before.
"""
SITES = """\
A site is an adapted layer. Launches per site are the launches of the forward and backward pass of the adapted model,
minus the launches of the frozen base model, divided by the number of sites. Only operators with their own kernel are
counted, not views and allocations. Kernels are calls that launch a kernel; the replay of a CUDA graph is one launch.
"""


def page(report: Report) -> str:
    """The whole page."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield from ("# On a GPU", "", NOTES, "| | |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in report.about.items())
    yield ""
    yield from (f'**The part "{part}" ended with an error**: {why}\n' for part, why in report.failures.items())
    for group in dict.fromkeys(check.group for check in report.checks):
        yield from (f"## {group}", "", "| | | |", "|---|---|---|")
        checks = [check for check in report.checks if check.group == group]
        yield from (f"| {check.words} | {check.verdict} | {check.detail} |" for check in checks)
        yield ""
    for group in dict.fromkeys(ratio.group for ratio in report.ratios):
        yield from (f"## {group}", "", "| | |", "|---|--:|")
        yield from (f"| {ratio.words} | {ratio.value:.2f} |" for ratio in report.ratios if ratio.group == group)
        yield ""
    yield from _launches(report)
    if report.cells:
        yield from ("## Time and memory", "", *tables(report.cells))


def _launches(report: Report) -> Iterator[str]:
    if report.launches:
        yield from ("## Launches per site and step", "", SITES)
    for unit, counted in report.launches.items():
        yield from table(f"{unit.capitalize()}, r=8", {WORKLOADS[one.setting.workload].title: one for one in counted})
