"""The programs of the guides run as they stand, without warnings."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from documents import DOCS, ROOT, python_blocks, run_blocks

import hra_fx

#: The changelog names what was removed.
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_the_names_in_a_document_exist(document: Path) -> None:
    assert unknown_names(document.read_text(encoding="utf-8")) == set()


def unknown_names(text: str) -> set[str]:
    """The names after `hra_fx.` that are neither attributes nor modules."""
    named = set(re.findall(r"(?<![\w/.-])hra_fx\.(\w+)(?![\w/]|\.json|\.md)", text))
    return {name for name in named if not hasattr(hra_fx, name) and not find_spec(f"hra_fx.{name}")}


def test_unknown_names_are_found() -> None:
    text = "`hra_fx.transfrom(model)` hra_fx.fold hra_fx.errors.HRAError\n```python\nx = (hra_fx.reprot(model))\n```"
    assert unknown_names(text) == {"transfrom", "reprot"}


def test_the_front_page_shows_calls_that_exist() -> None:
    (block,) = python_blocks(DOCS / "index.md")
    compile(block.text, "index.md", "exec")
    called = {name for name in hra_fx.__all__ if f"hra_fx.{name}(" in block.text}
    assert called == {"HRAConfig", "transform", "report", "save_adapter", "fold"}
