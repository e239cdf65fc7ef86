"""Runs the jobs of a run one after another, and prints the progress."""

from __future__ import annotations

import argparse
import fnmatch
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from speed.environment import busy, environment
from speed.grid import Job, full, quick
from speed.measuring import carry_out
from speed.results import Results
from speed.timing import by_processor, clocked

RUNS: dict[str, Callable[[], Iterable[Job]]] = {"full": full, "quick": quick}


def measure(options: argparse.Namespace) -> Results:
    """Run all jobs, and save the results after each."""
    begin = time.monotonic()
    jobs = [job.scaled(options.budget) for job in RUNS[options.run]() if wanted(job, options.only)]
    whole = not options.only and options.budget >= 1
    results = Results(environment(options.run, whole=whole, by_processor=options.processor))
    results.about |= {"load average at end": busy(), "minutes": 0.0}
    with quiet(), _own_compiler_cache(options.run != "quick"):
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


@contextmanager
def _own_compiler_cache(own: bool) -> Iterator[None]:
    """If `own`, an empty cache for inductor, so that compilation times are those without a cache."""
    if not own:
        yield
        return
    name, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before
