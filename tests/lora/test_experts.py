"""Adapted experts as PEFT's LoRA: PEFT loads the folder and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from moe_models import built, call_of, experts_config, randomise
from oracles import relative_error

import hra_fx

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("fields", [{}, {"r": 3, "target_modules": ["q_proj"]}, {"apply_GS": True}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_peft_computes_the_same(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    call = call_of(name)
    model = hra_fx.transform(built(name, torch.float32, "eager"), experts_config(**fields))
    with torch.no_grad():
        for parameter, vectors in model.named_parameters():
            if ".hra_u." in parameter:
                vectors.normal_()
        wanted = model(**call).logits
    result = hra_fx.save_as_lora(model, tmp_path / "lora")
    assert len(result.rows) == (6 if "target_modules" in fields else 4)
    base = built(name, torch.float32, "eager")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    with torch.no_grad():
        assert relative_error(loaded(**call).logits, wanted) <= 1e-5
        with loaded.disable_adapter():
            assert relative_error(loaded(**call).logits, wanted) > 1e-2


def test_one_of_the_parameters_and_a_smaller_rank(tmp_path: Path) -> None:
    call = call_of("qwen3_moe")
    config = experts_config(r=4, target_parameters=["experts.down_proj"])
    model = hra_fx.transform(built("qwen3_moe", torch.float32, "eager"), config)
    randomise(model)
    rows = hra_fx.save_as_lora(model, tmp_path / "small", rank=2).rows
    assert all(row.rank == 2 and 0 < row.error < 1 for row in rows)
    hra_fx.save_as_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(built("qwen3_moe", torch.float32, "eager"), tmp_path / "lora")
    with torch.no_grad():
        assert relative_error(loaded(**call).logits, model(**call).logits) <= 1e-5
