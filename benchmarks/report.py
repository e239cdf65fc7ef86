"""Run every measurement whose code has changed since it was made, and write docs/measurements.md.

    make report

A measurement is current if hra_fx, its own program and the helpers of all programs have not changed since its commit.
It takes hours if nothing is current. Stop it at any time; it goes on with what is missing. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from speed.environment import busy, commit, processor, version

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measurements.md"
#: The highest load average of an idle machine.
IDLE = 0.5
#: What every measurement depends on.
SHARED = ("hra_fx", "passes", "benchmarks/turns.py", "benchmarks/speed")
INTRODUCTION = """\
<!-- Written by make report; do not edit. -->
# Measurements

What each command printed or wrote, and with which code, releases and processor. Many numbers in the guides are
from here.

"""


@dataclass(frozen=True)
class Measurement:
    """A make target that measures something.

    Args:
        target: its name.
        program: what it runs, below the root of the repository.
        told_in: the documents with its numbers.
        page: the page of docs/ that it writes itself; without one, it prints.
    """

    target: str
    program: str
    told_in: str
    page: str | None = None


MEASUREMENTS = (
    Measurement("zoo", "tests/zoo", "zoo.md, layers.md, README", "zoo.md"),
    Measurement("bench", "benchmarks/speed", "benchmarks.md, comparison.md, README", "benchmarks.md"),
    Measurement("bench-launches", "benchmarks/launches.py", "benchmarks_launches.md", "benchmarks_launches.md"),
    Measurement("bench-costs", "benchmarks/learning/costs.py", "comparison.md", "costs.json"),
    Measurement("features", "benchmarks/features.py", "comparison.md"),
    Measurement("bench-host", "benchmarks/host.py", "README"),
    Measurement("bench-graphs", "benchmarks/graphs.py", "how-it-works.md"),
    Measurement("bench-pairs", "benchmarks/pairs.py", "training.md"),
    Measurement("bench-disk", "benchmarks/disk.py", "folding.md"),
    Measurement("export-table", "tests/export/exporting", "export.md"),
    Measurement("bench-convert", "benchmarks/convert.py", "serving.md"),
    Measurement("bench-quantized", "benchmarks/quantized.py", "quantized.md"),
    Measurement("bench-switch", "benchmarks/switching.py", "several-adapters.md"),
    Measurement("bench-peft", "benchmarks/peft_layers.py", "peft.md"),
    Measurement("bench-moe", "benchmarks/moe.py", "moe.md"),
    Measurement("bench-mixed", "benchmarks/mixed.py", "mixed_batches.md"),
    Measurement("bench-page", "benchmarks/page.py", "visualize.md"),
)


def sections(text: str) -> dict[str, str]:
    """Target -> what docs/measurements.md has of it: the line on the environment, and the output.

    >>> sections("# Measurements\\n\\n## bench-host\\n\\ncommit abc; ...\\n")
    {'bench-host': 'commit abc; ...'}
    """
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def commit_in(text: str) -> str | None:
    """The commit that a text names first, unless it had uncommitted changes.

    >>> commit_in("torch 2.13; commit 1a2b3c4; AMD"), commit_in("| commit | 1a2b3c4 |")
    ('1a2b3c4', '1a2b3c4')
    >>> commit_in("commit 1a2b3c4, with uncommitted changes")
    """
    found = re.search(r"\bcommit (?:\| )?([0-9a-f]{7,40})(, with)?", text)
    return found[1] if found and not found[2] else None


def is_current(measurement: Measurement, at: str | None) -> bool:
    """Whether nothing that a measurement depends on has changed since a commit."""
    if at is None:
        return False
    done = subprocess.run(
        ["git", "diff", "--quiet", at, "--", *SHARED, measurement.program], cwd=ROOT, capture_output=True
    )
    return done.returncode == 0


def measured_at(measurement: Measurement, printed: dict[str, str]) -> str | None:
    """The commit at which a measurement was made, if it says so."""
    if measurement.page is None:
        return commit_in(printed.get(measurement.target, ""))
    page = ROOT / "docs" / measurement.page
    return commit_in(page.read_text(encoding="utf-8")) if page.exists() else None


def make(target: str) -> str:
    """Run a make target, and return what it prints without make's own lines. Benchmarks wait for an idle machine."""
    while target.startswith("bench") and busy() > IDLE:  # the last minute includes the previous measurement
        time.sleep(5)
    command = ["make", "--no-print-directory", "--silent", target]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def environment() -> str:
    """With which code, releases and processor something is measured now."""
    releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{releases}; commit {commit()}; {processor()}."


def page_of(printed: dict[str, str]) -> str:
    """The text of docs/measurements.md."""
    rows = [
        f"| `make {each.target}` | {each.told_in} | {measured_at(each, printed) or 'not measured'} |"
        for each in MEASUREMENTS
    ]
    table = "\n".join(["| command | numbers are in | measured at commit |", "|---|---|---|", *rows])
    parts = [f"## {each.target}\n\n{printed[each.target]}\n" for each in MEASUREMENTS if each.target in printed]
    return "\n".join([f"{INTRODUCTION}{table}\n", *parts])


def stale(printed: dict[str, str]) -> Iterator[Measurement]:
    """The measurements that are not current."""
    yield from (each for each in MEASUREMENTS if not is_current(each, measured_at(each, printed)))


def report(page: Path = PAGE, run: Callable[[str], str] = make, only: Collection[str] = ()) -> None:
    """Make what is not current, and write the page after each. `only` selects targets."""
    printed = sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    for measurement in [each for each in stale(printed) if not only or each.target in only]:
        print(f"make {measurement.target}", flush=True)
        about, output = environment(), run(measurement.target)
        if measurement.page is None:
            printed[measurement.target] = f"{about}\n\n```\n{output}\n```"
        page.write_text(page_of(printed), encoding="utf-8")


def main() -> None:
    """Run what is missing, or only tell what that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only print what is not current")
    parser.add_argument("--only", nargs="+", default=(), metavar="TARGET", help="measure only these, if not current")
    given = parser.parse_args()
    if not given.list:
        report(only=given.only)
        return
    printed = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for measurement in stale(printed):
        print(f"make {measurement.target}: {measured_at(measurement, printed) or 'not measured'}")


if __name__ == "__main__":
    main()
