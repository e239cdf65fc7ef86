"""The page: its plot, its link to that of a GPU, and its caveats."""

from __future__ import annotations

from pathlib import Path

import pytest
from speed import grid
from speed.methods import TRAINING
from speed.page import page, write
from speed.plot import plotted
from speed.results import Cell, Results
from speed.setting import Setting
from speed.timing import Measured


def test_a_plot_is_drawn_of_two_sizes_or_more(tmp_path: Path) -> None:
    values: dict[str, list[float | None]] = {key: [1.0 + place] for place, key in enumerate(TRAINING)}
    cells = [Cell(Setting(grid.LLAMA, "training", size), Measured(dict(values))) for size in (16, 512)]
    results = Results({"run": "full"}, cells)
    assert plotted(results)
    files = write(results, tmp_path)
    assert [file.name for file in files] == ["benchmarks.md", "benchmarks.svg"]
    assert "](benchmarks.svg)" in files[0].read_text()
    assert "PEFT LoRA" in files[1].read_text()


def test_the_page_of_a_gpu_is_linked_if_it_is_there(tmp_path: Path) -> None:
    assert "](benchmarks_gpu.md)" not in page(Results({"run": "full"}))
    (tmp_path / "benchmarks_gpu.md").touch()
    (file,) = write(Results({"run": "full"}), tmp_path)
    assert "[benchmarks_gpu.md](benchmarks_gpu.md)" in file.read_text()


@pytest.mark.parametrize(
    ("about", "doubt"),
    [
        ({"load average at start": 1.5, "cores": 2}, "busy (load average 1.5 at the start, 2 cores)"),
        (
            {"load average at start": 1.5, "cores": 2, "seconds": "CPU time"},
            "2 cores); times are CPU times.",
        ),
        ({"measured": "a part"}, "Only a part of the settings"),
        ({"load average at start": 0.4, "cores": 2, "measured": "everything"}, ""),
    ],
)
def test_a_page_says_what_makes_it_unsure(about: dict[str, object], doubt: str) -> None:
    text = page(Results({"run": "full", **about}))
    assert doubt in text
    assert ("**The" in text or "**Only" in text) is bool(doubt)
