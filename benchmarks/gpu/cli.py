"""The command line.

    PYTHONPATH=.:benchmarks python -m gpu --docs        # or: make bench-gpu PYTHON=python; under 9 minutes
    PYTHONPATH=.:benchmarks python -m gpu --smoke       # the same program on a CPU, with tiny models

Results are written after each part, as JSON and as a page, to build/gpu or the folder of --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from speed.environment import environment
from speed.running import quiet

from gpu.page import page
from gpu.plan import for_gpu, smoke
from gpu.report import Report
from gpu.run import Run, WrongResult, verdicts

ROOT = Path(__file__).resolve().parents[2]
NAME = "benchmarks_gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts. Return 0 on success, and 1 if a check fails, a part raises, or CUDA is not available."""
    options = options_of(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("torch sees no CUDA device, so nothing was measured; --smoke runs on the CPU.", file=sys.stderr)
        return 1
    report = Report(about_run(smoke=options.smoke))
    pages = [
        options.out / f"{NAME}.md",
        *([ROOT / "docs" / f"{NAME}.md"] if options.docs and not options.smoke else []),
    ]

    def save() -> None:
        report.save(options.out / f"{NAME}.json")
        for file in pages:
            file.write_text(page(report))

    torch.backends.cudnn.allow_tf32 = False
    try:
        with quiet():
            Run(smoke() if options.smoke else for_gpu(), report, options.budget, save).all()
    except WrongResult as wrong:
        print(f"Wrong result, so nothing was measured: {wrong}", file=sys.stderr)
        return 1
    problems = list(verdicts(report))
    print(*problems, *(f"Written: {file}" for file in pages), sep="\n")
    return 1 if problems else 0


def about_run(*, smoke: bool) -> dict[str, object]:
    """The environment, with the card."""
    about: dict[str, object] = environment("smoke" if smoke else "gpu")
    if torch.cuda.is_available():
        about["CUDA"] = torch.version.cuda
        about["memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    return about


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="for all parts (default 480)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER", help="for the results")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks_gpu.md too, but not with --smoke")
    return parser.parse_args(arguments)
