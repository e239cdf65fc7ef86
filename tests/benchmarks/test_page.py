"""The page: the summary, the tables, the plot, and what makes it unsure."""

from __future__ import annotations

from pathlib import Path

import pytest
from speed import grid
from speed.methods import TRAINING
from speed.page import page, write
from speed.plot import plotted
from speed.results import Cell, Results
from speed.setting import Setting
from speed.summary import summary
from speed.table import tables
from speed.timing import Measured


def test_a_plot_is_drawn_of_two_sizes_or_more(tmp_path: Path) -> None:
    values: dict[str, list[float | None]] = {key: [1.0 + place] for place, key in enumerate(TRAINING)}
    cells = [Cell(Setting(grid.LLAMA, "training", size), Measured(dict(values))) for size in (16, 512)]
    results = Results({"run": "full"}, cells)
    assert plotted(results)
    files = write(results, tmp_path)
    assert [file.name for file in files] == ["benchmarks.md", "benchmarks.svg"]
    assert "](benchmarks.svg)" in files[0].read_text()
    drawn = files[1].read_text()
    assert "PEFT LoRA" in drawn
    assert "5.0×" in drawn, "the value of PEFT HRA, which has an axis of its own"


def test_the_summary_divides_by_each_peer() -> None:
    eager = Measured({"base": [1.0], "lora": [2.0], "peft-hra": [30.0], "ours": [1.5]})
    compiled = Measured({"base-inductor": [1.0], "lora-inductor": [2.0], "ours-inductor": [0.5]})
    folded = Measured({"base": [4.0], "folded": [4.0]})
    cells = [
        Cell(Setting(grid.LLAMA, "training", 512), eager),
        Cell(Setting(grid.LLAMA, "training", 512, compiled=True), compiled),
        Cell(Setting(grid.LLAMA, "inference", 512), folded),
    ]
    assert list(summary(Results({}, cells)))[2:] == [
        "| training step, 512 tokens | 1.50 s | 0.75 | 0.050 | 1.50 |",
        "| training step, 512 tokens, compiled | 500 ms | 0.25 | - | 0.50 |",
        "| inference, 512 tokens, folded | 4.00 s | - | - | 1.00 |",
    ]


def test_other_models_share_a_table_and_say_which_they_are() -> None:
    values: dict[str, list[float | None]] = {"base": [2.0, 2.0], "base-again": [2.1, 2.1], "ours": [3.0, 3.0]}
    cells = [Cell(Setting(model, "training", 4), Measured(dict(values))) for model in ("vit", "resnet50", grid.LLAMA)]
    text = "\n".join(tables(cells))
    assert "### Training step: other models, float32, r=8" in text
    assert "| ResNet-50, its 3x3 convolutions, images of 64 | 4 images | 2.00 s | 1.50 |" in text
    assert "### Training step: Llama, d=768, 3 layers, float32, r=8" in text
    assert "\n| 4 tokens | 2.00 s | 1.50 |" in text
    assert text.count("Noise: a copy of the base model takes 1.05.") == 2


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
