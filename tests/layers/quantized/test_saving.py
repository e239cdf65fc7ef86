"""Quantized models with adapters: files, LoRA, reports, and whole models as far as their libraries support it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from layers.quantized.bases import FEW, SCHEMES, WIDTH, adapted, config, inputs, int4, quantized, values
from lora.kinds import exported_change, product
from lora.test_in_peft import loaded as lora_over
from oracles import layer_q, relative_error
from reporting.made import oracle_share
from tiny import llama
from tiny_models import config_for, tokens_of
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import hra_fx
from hra_fx.errors import AdapterError


@pytest.mark.parametrize("scheme", FEW)
def test_an_adapter_is_loaded_over_a_quantized_base(scheme: str, tmp_path: Path) -> None:
    model, x = adapted(scheme), inputs()
    hra_fx.save_adapter(model, tmp_path)
    loaded = hra_fx.load_adapter(quantized(scheme), tmp_path, is_trainable=True)
    _assert_same(loaded, model, x)
    empty = hra_fx.transform(quantized(scheme), config(), low_cpu_mem_usage=True)
    assert empty[0].hra_u["default"].is_meta
    hra_fx.load_adapter(empty, tmp_path, is_trainable=True)
    _assert_same(empty, model, x)


def _assert_same(model: nn.Module, wanted: nn.Module, x: Tensor) -> None:
    """Vectors of a file become pairs, which rounds them. A quantized input may be rounded to another value then."""
    for loaded, own in zip(map(layer_q, (model[0], model[2])), map(layer_q, (wanted[0], wanted[2])), strict=True):
        assert relative_error(loaded, own) < 1e-6
    assert relative_error(model.train()(x), wanted.train()(x)) < 5e-3


@pytest.mark.parametrize("scheme", [name for name in FEW if name != "bnb nf4"])
def test_a_state_dict_goes_round(scheme: str) -> None:
    model, other = adapted(scheme), hra_fx.transform(quantized(scheme), config())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    # Python 3.11.2 pickles torchao's enumerations in a way that torch.load takes for code.
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other.train()(inputs()), model.train()(inputs()))


# ---- as LoRA: the product of the factors is the change of the dequantized weight ----


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
    lora = lora_over(base, tmp_path)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    # With gradients: without them, bitsandbytes rounds the products of 4-bit weights to bfloat16.
    before, wanted, actual = base(x.requires_grad_()), model(x), lora(x)
    assert relative_error(actual - before, wanted - before) < SCHEMES[scheme].tolerance


# ---- the share of a quantized weight that is rotated, compared with dense projectors in float64 ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_report_a_graph_and_a_picture_change_nothing(scheme: str, tmp_path: Path) -> None:
    """One large entry in each row makes the rounding error large. An evaluation may change the layout of a weight."""
    base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    with torch.no_grad():
        for layer in (base[0], base[2]):
            layer.weight.mul_(1e-3)[:, 0] = 1.0
    model = hra_fx.transform(quantized(scheme, base), config(apply_GS=scheme in FEW))
    assert [row.share for row in hra_fx.report(model)] == [0.0, 0.0]
    randomise(model)
    x = inputs()
    before, output = [values(model[0]), values(model[2])], model(x)
    rows = hra_fx.report(model).rows
    assert [(row.path, row.d, row.r) for row in rows] == [("0", 64, 4), ("2", 128, 4)]
    for row, layer, weight in zip(rows, (model[0], model[2]), before, strict=True):
        assert row.share == pytest.approx(oracle_share(weight, layer_q(layer).detach()), rel=1e-5)
        assert torch.equal(values(layer), weight)
    (graph,) = hra_fx.graphs(model).values()
    assert torch.equal(graph(x), output) and torch.equal(model(x), output)
    hra_fx.visualize(model, tmp_path / "adapters.svg")
    with torch.no_grad():
        model.eval()(x)
    assert [row.share for row in hra_fx.report(model)] == [row.share for row in rows]


def test_share_of_a_weight_that_cannot_be_dequantized_is_nan() -> None:
    model = hra_fx.transform(int4(), config("0"))
    randomise(model)
    (row,) = hra_fx.report(model)
    assert math.isnan(row.share)
    assert row.angle > 0


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
    return hra_fx.transform(loaded(folder, name), config_for("llama", target_modules="all-linear", pairs=False))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens_of(2, 8)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_saved_loaded_and_generate(name: str, folder: Path, tmp_path: Path) -> None:
    model = adapted_model(folder, name)
    randomise(model)
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


@pytest.mark.parametrize("name", ["bnb nf4", "ao int4"])
def test_the_vocabulary_is_resized(name: str, folder: Path) -> None:
    model = adapted_model(folder, name)
    randomise(model)
    before = logits(model)
    model.resize_token_embeddings(80, mean_resizing=False)
    assert torch.allclose(logits(model)[..., :64], before, atol=1e-4)


def test_dequantize_is_refused_and_works_before(folder: Path, tmp_path: Path) -> None:
    model = adapted_model(folder, "bnb int8")
    randomise(model)
    with pytest.raises(
        AdapterError, match="dequantize replaces the adapted layers, so they would lose their reflections"
    ):
        model.dequantize()
    model.save_pretrained(tmp_path)
    plain = hra_fx.load_adapter(loaded(folder, "bnb int8").dequantize(), tmp_path)
    folded = hra_fx.fold(plain)
    assert torch.allclose(logits(folded), model.train()(input_ids=tokens_of(2, 8)).logits, atol=1e-2)
