"""A program in onnxruntime gives what PyTorch gives, and the recipes of docs/export.md run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import tiny
import torch
from adapting import QUIET, adapted, randomise
from documents import DOCS, python_blocks
from torch.export import Dim

import hra_fx

pytestmark = [QUIET, pytest.mark.slow]
LIMIT = 1e-5
SHAPES = {"input_ids": {0: Dim("batch", max=16), 1: Dim("length", max=32)}}


def t5_encoder() -> Any:
    return hra_fx.fold(adapted(tiny.t5("T5EncoderModel", vocab_size=tiny.VOCABULARY).eval(), "q", "v", "wi", "wo"))


@pytest.mark.parametrize(
    "build",
    [lambda: adapted(tiny.opt(use_cache=False).eval(), "q_proj", "v_proj", "fc1", r=5), t5_encoder],
    ids=["OPT", "T5 encoder, folded"],
)
def test_onnxruntime_gives_what_pytorch_gives_at_another_batch_and_length(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    model = build()
    ids, other = (torch.randint(0, tiny.VOCABULARY, size) for size in ((2, 7), (3, 11)))
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=SHAPES)
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = torch.from_numpy(session.run(None, {"input_ids": other.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, model(other)[0], rtol=LIMIT, atol=LIMIT)


def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in python_blocks(DOCS / "export.md"):
        if not block.comment and "export_training_step" not in block.text:  # that has a model of its own
            exec(compile(block.text, "export.md", "exec"), names)
    model, ids, swappable = names["model"], names["ids"], names["swappable"]
    randomise(model)
    with torch.no_grad():
        for adapter in ("other", "slot"):
            hra_fx.set_adapter(model, adapter)
            factors = hra_fx.adapter_inputs(model, swappable.get_overridable_initializers())
            (logits,) = swappable.run(None, {"input_ids": ids.numpy(), **factors})
            torch.testing.assert_close(torch.from_numpy(logits), model(ids).logits, rtol=LIMIT, atol=LIMIT)
