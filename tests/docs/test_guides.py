"""The programs of the guides run as they stand, without warnings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from documents import DOCS, python_blocks, run_blocks

import hra_fx

#: Guides whose programs run, and what their folders have afterwards.
GUIDES = {
    "quickstart": {"adapters.html", "my-adapter", "my-model"},
    "layers": set(),
    "several-adapters": set(),
    "visualize": {"adapters.html", "adapters.mmd", "adapters.svg", "block.svg", "heatmap.svg", "two.svg"},
    "folding": {"folded", "my-adapter", "my-model", "restored"},
    "how-it-works": set(),
}


@pytest.mark.parametrize("name", GUIDES)
def test_the_programs_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(DOCS / f"{name}.md")
    assert {entry.name for entry in tmp_path.iterdir()} == GUIDES[name]


def test_the_front_page_shows_calls_that_exist() -> None:
    (block,) = python_blocks(DOCS / "index.md")
    compile(block.text, "index.md", "exec")
    called = {name for name in hra_fx.__all__ if f"hra_fx.{name}(" in block.text}
    assert called == {"HRAConfig", "transform", "report", "save_adapter", "fold"}
