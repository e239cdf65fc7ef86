"""Adapters over quantized bases are saved, exported and reported, and whole models as far as their libraries allow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.quantized.bases import EXACT, SCHEMES, adapted, config, inputs, quantized, values
from lora.kinds import exported_change
from oracles import layer_q, relative_error
from tiny import llama
from tiny_models import config_for
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hra_fx
from hra_fx.errors import AdapterError, FoldError


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_is_saved_and_loaded_exported_reported_and_not_folded(scheme: str, tmp_path: Path) -> None:
    model, x = adapted(scheme), inputs()
    output, before = model(x), [values(model[0]), values(model[2])]
    hra_fx.save_adapter(model, tmp_path)
    _, lora = hra_fx.convert_to_lora(model)
    (graph,) = hra_fx.graphs(model).values()
    hra_fx.visualize(model, tmp_path / "adapters.svg")
    for place, row in zip((0, 2), hra_fx.report(model).rows, strict=True):
        weight, q = values(model[place]), layer_q(model[place]).detach()
        assert relative_error(exported_change(lora, str(place)), weight @ q - weight) < 1e-6
        assert row.weight_change == pytest.approx(relative_error(weight @ q, weight), rel=1e-5)
    for act in (hra_fx.fold, hra_fx.merge_adapter):
        with pytest.raises(FoldError) as caught:
            act(model)
        text = f"0: its weight is quantized ({scheme.partition(':')[0]}), and cannot be folded or merged. "
        assert str(caught.value).startswith(text) and "without quantization" in str(caught.value)
    assert torch.equal(model(x), output) and torch.equal(graph(x), output)
    assert all(map(torch.equal, before, [values(model[0]), values(model[2])]))

    empty = hra_fx.transform(quantized(scheme), config(), low_cpu_mem_usage=True)
    assert empty[0].hra_u["default"].is_meta
    for again in (hra_fx.load_adapter(base, tmp_path, is_trainable=True) for base in (quantized(scheme), empty)):
        # Vectors of a file become pairs, which rounds them. A quantized input may be rounded to another value then.
        assert relative_error(layer_q(again[2]), layer_q(model[2])) < 1e-6
        assert relative_error(again(x), output) < (1e-5 if scheme in EXACT else 5e-3)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "4bit" not in name and "Opaque" not in name])
def test_a_state_dict_goes_round(scheme: str) -> None:
    model, other = adapted(scheme), hra_fx.transform(quantized(scheme), config())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    # Python 3.11.2 pickles torchao's enumerations in a way that torch.load takes for code.
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other(inputs()), model(inputs()))


def test_a_model_of_transformers_is_not_dequantized_under_its_adapters(tmp_path: Path) -> None:
    llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    hra_fx.transform(model, config_for("llama", target_modules="all-linear"))
    with pytest.raises(AdapterError, match="dequantize would replace adapted layers, which would lose their adapters"):
        model.dequantize()
