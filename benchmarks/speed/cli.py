"""The command line.

    PYTHONPATH=benchmarks python -m speed                          # everything, about half an hour on two cores
    PYTHONPATH=benchmarks python -m speed --quick                  # the main settings, about six minutes
    PYTHONPATH=benchmarks python -m speed --few                    # few tokens in models whose projections all adapt
    PYTHONPATH=benchmarks python -m speed --smoke                  # every mode on a tiny model, in seconds
    PYTHONPATH=benchmarks python -m speed --only bfloat16

Results go to build/speed as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from speed.environment import caveats
from speed.results import load
from speed.running import measure
from speed.table import table

ROOT = Path(__file__).resolve().parents[2]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for run in ("quick", "few", "smoke"):
        parser.add_argument(f"--{run}", action="store_const", const=run, default="full", dest="run")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only settings with all these words")
    parser.add_argument(
        "--processor", action="store_true", help="measure CPU time instead of wall time, for a busy machine"
    )
    parser.add_argument("--json", type=Path, help="file for the results (default build/speed/RUN.json)")
    parser.add_argument("--from", type=Path, dest="read", metavar="JSON", help="show these results without measuring")
    options = parser.parse_args(arguments)
    options.json = options.json or ROOT / "build" / "speed" / f"{options.run}.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, and print the table."""
    options = options_of(arguments)
    results = load(options.read) if options.read else measure(options)
    print(*table(results.cells), *(f"{key}: {value}" for key, value in results.about.items()), sep="\n")
    print(*caveats(results.about), sep="\n")
    return 0
