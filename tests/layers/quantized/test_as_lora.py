"""LoRA files of adapters on quantized models: their product is the change of the dequantized weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layers.quantized.bases import SCHEMES, WIDTH, adapted, quantized, values
from lora.kinds import exported_change, product
from lora.test_in_peft import loaded
from oracles import relative_error

import hra_fx


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_factors_are_the_change_of_the_dequantized_weight(scheme: str) -> None:
    model: Any = adapted(scheme)
    _, tensors = hra_fx.convert_to_lora(model)
    for path in ("0", "2"):
        weight, q = values(model[int(path)]).double(), product(model[int(path)], ["default"])
        assert relative_error(exported_change(tensors, path), weight @ q - weight) < 1e-6


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("scheme", ["bnb fp4 nested", "ao int4"])
def test_peft_adds_the_change_to_the_same_quantized_base(scheme: str, tmp_path: Path) -> None:
    base, model = quantized(scheme), adapted(scheme)
    hra_fx.save_as_lora(model, tmp_path)
    lora = loaded(base, tmp_path)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    # With gradients: without them, bitsandbytes rounds the products of 4-bit weights to bfloat16.
    before, wanted, actual = base(x.requires_grad_()), model(x), lora(x)
    assert relative_error(actual - before, wanted - before) < SCHEMES[scheme].tolerance
