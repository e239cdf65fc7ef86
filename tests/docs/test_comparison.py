"""docs/comparison.md: its cells agree with what is measured and tried."""

from __future__ import annotations

import features
from documents import ROOT
from learning.page import comparison_table
from learning.records import read

PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


def rows(section: str) -> list[str]:
    """The rows of the tables in a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]


def test_the_scores_are_those_of_the_records() -> None:
    assert comparison_table(read()) in PAGE, "write the table of learning.page.comparison_table(read())"


def test_the_speeds_are_those_of_the_benchmark() -> None:
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    told = rows("Speed and memory")
    assert len(told) == 8
    assert set(told) <= set(measured)


def test_the_features_are_those_that_were_tried() -> None:
    for row, (label, probe) in zip(rows("Features")[1:], features.PROBES.items(), strict=True):
        cells = [features.tried(probe, adapt)[0] for adapt in features.METHODS.values()]
        assert row == f"| {label} | {' | '.join(cells)} |"
