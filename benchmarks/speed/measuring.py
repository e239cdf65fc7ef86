"""Measures one job of the grid."""

from __future__ import annotations

import gc
from typing import Any, cast

from speed import memory
from speed.grid import Job
from speed.once import steps_once
from speed.results import Cell
from speed.steps import steps_of
from speed.timing import Measure, Measured, clocked, interleave


def carry_out(job: Job, measure: Measure = clocked) -> Cell:
    """Measure a setting."""
    setting = job.setting
    gc.collect()  # the models of the one before
    if setting.mode == "memory" and setting.device == "cpu":
        return Cell(setting, memory.peaks(setting, job.methods, rounds=job.budget.least))
    if setting.mode in ("transform", "fold"):
        return Cell(setting, interleave(steps_once(setting, job.methods), job.budget, measure))
    if setting.compiled:
        start_compiling_anew()
    steps, left_out = steps_of(setting, job.methods)
    measured = memory.peaks_on_cuda(steps) if setting.mode == "memory" else interleave(steps, job.budget, measure)
    return Cell(setting, Measured(measured.values, measured.first, left_out | measured.left_out))


def start_compiling_anew() -> None:
    """Clear what was compiled before, and compile something small, so that one-time work of the compiler is done."""
    import torch
    import torch._dynamo

    torch._dynamo.reset()
    # All methods share the code of the base model's forward, and torch counts compilations by code.
    cast(Any, torch._dynamo.config).recompile_limit = 64
    x = torch.ones(64, requires_grad=True)
    torch.compile(lambda x: (x.sin() + 1).sum())(x).backward()
