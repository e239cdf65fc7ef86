"""The command line.

    PYTHONPATH=benchmarks python -m speed                          # everything, about 40 minutes on two cores
    PYTHONPATH=benchmarks python -m speed --quick                  # the performance targets, about six minutes
    PYTHONPATH=benchmarks python -m speed --only 'bert' --budget 0.1

Results go to build/speed as JSON; docs/ is written only with --docs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from speed.environment import caveats
from speed.results import load
from speed.running import measure
from speed.table import tables
from speed.target_report import as_text
from speed.targets import findings

ROOT = Path(__file__).resolve().parents[2]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_const", const="quick", default="full", dest="run")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only settings with all these words")
    parser.add_argument("--budget", type=float, default=1.0, metavar="TIMES", help="factor for the time per setting")
    parser.add_argument(
        "--processor", action="store_true", help="measure CPU time instead of wall time, for a busy machine"
    )
    parser.add_argument(
        "--docs", type=Path, nargs="?", const=ROOT / "docs", help="write the page, into docs/ or the given folder"
    )
    parser.add_argument("--json", type=Path, help="file for the results (default build/speed/RUN.json)")
    parser.add_argument("--from", type=Path, dest="read", metavar="JSON", help="show these results without measuring")
    options = parser.parse_args(arguments)
    options.json = options.json or ROOT / "build" / "speed" / f"{options.run}.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    options = options_of(arguments)
    results = load(options.read) if options.read else measure(options)
    if options.read is None:
        print(f"\n{results.about['minutes']} minutes; the results are in {_shown(options.json)}.")
    print("\n" + "\n".join(tables(results.cells, warm_compiler=results.about["run"] == "quick")))
    print(as_text(findings(results)))
    print(*caveats(results.about), sep="\n")
    if options.docs:
        from speed.page import write

        print(*(f"Written: {_shown(file)}" for file in write(results, options.docs)), sep="\n")
    return 0


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
