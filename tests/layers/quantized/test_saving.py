"""Adapters over quantized bases are saved, exported and reported, and whole models as far as their libraries allow."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from layers.quantized.bases import EXACT, SCHEMES, adapted, config, inputs, quantized, values
from lora.kinds import exported_change
from oracles import layer_q, relative_error, share_of
from tiny import llama
from tiny_models import config_for, tokens_of
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

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
        assert row.share == pytest.approx(share_of(weight, q), rel=1e-5)
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


def test_int4_of_gpus_is_adapted_and_not_folded() -> None:
    """A layer as `Int4WeightOnlyConfig` creates it on a GPU. A CPU has no kernel to create or to call it."""
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    scale, zero = torch.ones(2, 32, dtype=torch.bfloat16), torch.zeros(2, 32, dtype=torch.bfloat16)
    weight = Int4Tensor(torch.zeros(32, 32, dtype=torch.int8), scale, zero, [1, 32], torch.Size([32, 64]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    model = hra_fx.transform(nn.Sequential(layer), config("0"))
    randomise(model)
    (row,) = hra_fx.report(model)
    assert math.isnan(row.share) and row.angle > 0
    with pytest.raises(FoldError, match=r"torchao, Int4Tensor\), and cannot be folded"):
        hra_fx.fold(model)


# ---- models of transformers that are quantized while they are loaded ----

CONFIGS: dict[str, Callable[[], Any]] = {
    "bnb int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bnb nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "ao int8 dynamic": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "ao int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama(hidden_size=128, intermediate_size=128).save_pretrained(path)
    return path


def loaded(folder: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name]())


def adapted_model(folder: Path, name: str) -> Any:
    """It trains vectors: pairs are rounded by a file, and then a quantized input may be rounded to another value."""
    torch.manual_seed(1)
    model = hra_fx.transform(loaded(folder, name), config_for("llama", target_modules="all-linear", pairs=False))
    randomise(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens_of(2, 8)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_saved_loaded_and_generate(name: str, folder: Path, tmp_path: Path) -> None:
    model = adapted_model(folder, name)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = hra_fx.load_adapter(loaded(folder, name), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(loaded(folder, name)), atol=1.0)
    text = model.generate(tokens_of(2, 4), max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(tokens_of(2, 4), max_new_tokens=4, do_sample=False), text)


def test_dequantize_is_refused_and_works_before(folder: Path, tmp_path: Path) -> None:
    model = adapted_model(folder, "bnb int8")
    with pytest.raises(
        AdapterError, match="dequantize replaces the adapted layers, so they would lose their reflections"
    ):
        model.dequantize()
    model.save_pretrained(tmp_path)
    plain = hra_fx.load_adapter(loaded(folder, "bnb int8").dequantize(), tmp_path)
    folded = hra_fx.fold(plain)
    assert torch.allclose(logits(folded), model.train()(input_ids=tokens_of(2, 8)).logits, atol=1e-2)
