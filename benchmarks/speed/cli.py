"""The command line.

    PYTHONPATH=benchmarks python -m speed                          # all of it, some 40 minutes on two cores
    PYTHONPATH=benchmarks python -m speed --quick                  # the lines that must hold, under five minutes
    PYTHONPATH=benchmarks python -m speed --gpu                    # bf16 at width 4096, on a CUDA device
    PYTHONPATH=benchmarks python -m speed --only 'bert' --budget 0.1

Numbers go to build/speed as JSON; docs/ is written with --docs only.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from speed.grid import Job, full, gpu, quick
from speed.lines import findings
from speed.report_lines import as_text
from speed.results import Results, load
from speed.table import tables

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"full": full, "quick": quick, "gpu": gpu}


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    for name in ("quick", "gpu"):
        which.add_argument(f"--{name}", action="store_const", const=name, dest="run")
    parser.set_defaults(run="full")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="settings with all these words")
    parser.add_argument("--budget", type=float, default=1.0, metavar="TIMES", help="times the usual seconds")
    parser.add_argument("--docs", type=Path, nargs="?", const=ROOT / "docs", help="write the page, into docs/ or there")
    parser.add_argument("--json", type=Path, help="where the numbers go (default build/speed/RUN.json)")
    parser.add_argument("--from", type=Path, dest="read", metavar="JSON", help="measure nothing, show these")
    options = parser.parse_args(arguments)
    options.json = options.json or ROOT / "build" / "speed" / f"{options.run}.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for."""
    options = options_of(arguments)
    if options.read is None and options.run == "gpu" and not _has_cuda():
        print("make bench-gpu: torch sees no CUDA device here, so nothing was measured.", file=sys.stderr)
        return 1
    results = load(options.read) if options.read else measure(options)
    print("\n" + "\n".join(tables(results.cells)))
    if results.about["run"] != "gpu":
        print(as_text(findings(results)))
    if options.docs:
        from speed.page import write

        print(*(f"Written: {_shown(file)}" for file in write(results, options.docs)), sep="\n")
    return 0


def measure(options: argparse.Namespace) -> Results:
    """Carry out the jobs of a run, and keep the numbers after each."""
    from speed.measuring import carry_out
    from speed.surroundings import busy, surroundings

    begin = time.monotonic()
    jobs = [job.scaled(options.budget) for job in RUNS[options.run]() if wanted(job, options.only)]
    results = Results(surroundings("part" if options.only or options.budget < 1 else options.run))
    with _quiet(), _own_compiler_cache(options.run != "quick"):
        for count, job in enumerate(jobs, 1):
            started = time.monotonic()
            print(f"[{count}/{len(jobs)}] {job.setting} ...", end=" ", file=sys.stderr, flush=True)
            cell = carry_out(job)
            results.cells.append(cell)
            print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            for method, why in cell.measured.left_out.items():
                print(f"    left out: {method}, {why}", file=sys.stderr, flush=True)
            results.about |= {"load average at end": busy(), "minutes": round((time.monotonic() - begin) / 60, 1)}
            results.save(options.json)
    print(f"{results.about.get('minutes', 0)} minutes; numbers in {_shown(options.json)}", file=sys.stderr)
    return results


def wanted(job: Job, patterns: Sequence[str]) -> bool:
    """Whether a job is asked for: each pattern is a word of its setting."""
    words = str(job.setting).split()
    return all(fnmatch.filter(words, pattern) for pattern in patterns)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries have to say of themselves."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(disabled)


@contextmanager
def _own_compiler_cache(own: bool) -> Iterator[None]:
    """An empty cache for inductor, so that the time of a compilation is that of the first; or the usual one."""
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
