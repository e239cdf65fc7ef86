"""Runs the jobs of a run one after another, and prints the progress."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch._dynamo

from speed import memory
from speed.environment import busy, environment
from speed.grid import Job, few, full, quick, smoke
from speed.results import Cell, Results
from speed.steps import steps_of
from speed.timing import Measure, Measured, by_processor, clocked, interleave

RUNS: dict[str, Callable[[], Iterable[Job]]] = {"full": full, "quick": quick, "few": few, "smoke": smoke}


def measure(options: argparse.Namespace) -> Results:
    """Run all jobs, and save the results after each."""
    begin = time.monotonic()
    jobs = [job for job in RUNS[options.run]() if wanted(job, options.only)]
    results = Results(environment(options.run, whole=not options.only, by_processor=options.processor))
    results.about |= {"load average at end": busy(), "minutes": 0.0}
    with quiet():
        for count, job in enumerate(jobs, 1):
            started = time.monotonic()
            _tell(f"[{count}/{len(jobs)}] {job.setting} ...", end=" ")
            cell = carry_out(job, by_processor if options.processor else clocked)
            _tell(f"{time.monotonic() - started:.0f} s")
            for method, why in cell.measured.left_out.items():
                _tell(f"    left out: {method}, {why}")
            results.cells.append(cell)
            results.about |= {"load average at end": busy(), "minutes": round((time.monotonic() - begin) / 60, 1)}
            results.save(options.json)
    return results


def carry_out(job: Job, measure: Measure = clocked) -> Cell:
    """Measure a setting."""
    setting = job.setting
    gc.collect()  # the models of the one before
    if setting.mode == "memory":
        return Cell(setting, memory.peaks(setting, job.methods, rounds=job.budget.least))
    if setting.compiled:
        start_compiling_anew()
    steps, left_out = steps_of(setting, job.methods)
    measured = interleave(steps, job.budget, measure)
    return Cell(setting, Measured(measured.values, left_out | measured.left_out))


def start_compiling_anew() -> None:
    """Clear what was compiled before, and compile something small, so that one-time work of the compiler is done."""
    torch._dynamo.reset()
    # All methods share the code of the base model's forward, and torch counts compilations by code.
    cast(Any, torch._dynamo.config).recompile_limit = 64
    x = torch.ones(64, requires_grad=True)
    torch.compile(lambda x: (x.sin() + 1).sum())(x).backward()


def _tell(words: str, end: str = "\n") -> None:
    print(words, end=end, file=sys.stderr, flush=True)


def wanted(job: Job, patterns: Sequence[str]) -> bool:
    """Whether each pattern matches a word of the job's setting."""
    words = str(job.setting).split()
    return all(fnmatch.filter(words, pattern) for pattern in patterns)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of libraries."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(disabled)
