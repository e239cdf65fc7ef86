"""Some cells of the table of exporters, and the recipes of docs/export.md; `make export-table` runs all cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import QUIET, randomise
from documents import DOCS, python_blocks
from export.exporting import exporters
from export.exporting.table import LIMIT, error_of, moved

import hra_fx

DOCUMENT = DOCS / "export.md"


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("OPT", "lowered"), ("BERT", "lowered"), ("T5 encoder", "folded")])
def test_onnxruntime_gives_what_pytorch_gives_at_another_batch_and_length(name: str, form: str) -> None:
    assert error_of(name, form, "onnx") <= LIMIT < moved(name) / 1000


@QUIET
@pytest.mark.slow
def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(DOCUMENT):
        if not block.comment and "export_training_step" not in block.text:  # that has a model of its own
            exec(compile(block.text, str(DOCUMENT), "exec"), names)
    check_hot_swap(names)
    check_compiled(names)


def check_hot_swap(names: dict[str, Any]) -> None:
    """The session of the document runs another adapter as PyTorch does."""
    model, ids, session = names["model"], names["ids"], names["swappable"]
    randomise(model, "other")
    with torch.no_grad():
        factors = hra_fx.adapter_inputs(model, session.get_overridable_initializers(), "other")
        (logits,) = session.run(None, {"input_ids": ids.numpy(), **factors})
        hra_fx.set_adapter(model, "other")
        assert float((torch.from_numpy(logits) - model(ids).logits).abs().max()) < LIMIT


def check_compiled(names: dict[str, Any]) -> None:
    """The compiled program of the document runs with other sizes than those of the export."""
    model = names["model"]
    hra_fx.set_adapter(model, "default")
    ids = torch.randint(0, 64, (5, 9))
    with torch.no_grad():
        assert float((names["compiled"](input_ids=ids).logits - model(ids).logits).abs().max()) < LIMIT


def test_the_recipes_of_what_is_not_installed_are_those_that_the_table_runs() -> None:
    source = Path(exporters.__file__).read_text(encoding="utf-8")
    marked = [block.text for block in python_blocks(DOCUMENT) if block.comment.endswith("exporters.py")]
    assert len(marked) == 2
    for line in "".join(marked).splitlines():
        assert line in source, line
