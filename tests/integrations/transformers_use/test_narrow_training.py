"""Training where the model or its arithmetic is bfloat16: the vectors stay in float32, and learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    BASES,
    adapted,
    trained_in,
    trainer_of,
    vectors_of,
)
from transformers import Trainer

LONG = {"max_steps": 40, "learning_rate": 3e-2}


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "arguments"),
    [("bert", "transform", torch.bfloat16, {}), ("llama", "HRAModel", torch.float32, {"bf16": True})],
    ids=["the model", "autocast"],
)
def test_the_loss_falls_the_vectors_stay_in_float32_and_a_run_goes_on_bitwise(
    kind: str, shape: str, dtype: torch.dtype, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model, resumed = (adapted(kind, shape, seed=seed, base=BASES[kind]().to(dtype)) for seed in (1, 77))
    before = trained_in(model)
    saving = {"save_strategy": "steps", "save_steps": 20}
    training = trainer_of(Trainer, kind, model, tmp_path, **LONG, **saving, **arguments)
    first = training.evaluate()["eval_loss"]
    training.train()
    assert training.evaluate()["eval_loss"] < first - 0.05
    assert {vectors.dtype for vectors in vectors_of(model).values()} == {torch.float32}
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".hra_u." not in name} == {dtype}
    assert [name for name in vectors_of(model) if torch.equal(trained_in(model)[name], before[name])] == []
    saved = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if ".hra_u." in name} == {torch.float32}
    again = trainer_of(Trainer, kind, resumed, tmp_path, **LONG, **saving, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    wanted, found = model.state_dict(), resumed.state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
