"""The command line.

    PYTHONPATH=benchmarks python -m speed                          # all of it, some 40 minutes on two cores
    PYTHONPATH=benchmarks python -m speed --quick                  # the lines that must hold, under five minutes
    PYTHONPATH=benchmarks python -m speed --gpu                    # bf16 at width 4096, on a CUDA device
    PYTHONPATH=benchmarks python -m speed --only 'bert' --budget 0.1

Numbers go to build/speed as JSON; docs/ is written with --docs only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from speed.lines import findings
from speed.report_lines import as_text
from speed.results import load
from speed.running import measure
from speed.surroundings import doubts
from speed.table import tables

ROOT = Path(__file__).resolve().parents[2]


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
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, on a machine in use")
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
    if options.read is None:
        print(f"\n{results.about['minutes']} minutes; the numbers are in {_shown(options.json)}.")
    print("\n" + "\n".join(tables(results.cells, warm_compiler=results.about["run"] == "quick")))
    if results.about["run"] != "gpu":
        print(as_text(findings(results)))
    print(*doubts(results.about), sep="\n")
    if options.docs:
        from speed.page import write

        print(*(f"Written: {_shown(file)}" for file in write(results, options.docs)), sep="\n")
    return 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
