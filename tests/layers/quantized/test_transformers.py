"""Models of transformers that are quantized as they are loaded, the usual way in: trained, saved, loaded, folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, config_for, llama, tokens_of, trainer_of, turn, vectors_of
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer

import hra_fx
from hra_fx.errors import AdapterError, HRAWarning

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
    llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def loaded(folder: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name]())


def adapted(folder: Path, name: str) -> Any:
    torch.manual_seed(1)
    return hra_fx.transform(loaded(folder, name), config_for("llama", target_modules="all-linear"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens_of(2, 8)).logits


def test_the_trainer_trains_evaluates_and_goes_on(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, "bnb int8")
    assert len(hra_fx.report(model)) == 14
    start = {key: vectors.detach().clone() for key, vectors in vectors_of(model).items()}
    trainer = trainer_of(Trainer, "llama", model, tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(vectors, start[key]) for key, vectors in vectors_of(model).items())
    loss = model.train()(**batch("llama")).loss
    gradients = torch.autograd.grad(loss, list(vectors_of(model).values()))
    assert all(gradient.norm() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_saved_loaded_and_generate(name: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, name)
    turn(model)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_models_are_saved_and_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, name)
    turn(model)
    with pytest.warns(HRAWarning, match="14 weights were quantized again"):
        hra_fx.fold(model, requantize=True)
    model.save_pretrained(
        tmp_path
    )  # first, for bitsandbytes changes the layout of weights where it evaluates (AVX512-BF16)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), atol=1e-3)


@pytest.mark.parametrize("name", ["bnb nf4", "ao int4"])
def test_the_vocabulary_is_resized(name: str, folder: Path) -> None:
    model = adapted(folder, name)
    turn(model)
    before = logits(model)
    model.resize_token_embeddings(80, mean_resizing=False)
    assert torch.allclose(logits(model)[..., :64], before, atol=1e-4)


def test_dequantize_is_refused_and_works_before(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, "bnb int8")
    turn(model)
    with pytest.raises(
        AdapterError, match="dequantize replaces the adapted layers, so they would lose their reflections"
    ):
        model.dequantize()
    model.save_pretrained(tmp_path)
    plain = hra_fx.load_adapter(loaded(folder, "bnb int8").dequantize(), tmp_path)
    folded = hra_fx.fold(plain)
    assert torch.allclose(logits(folded), model.train()(input_ids=tokens_of(2, 8)).logits, atol=1e-2)
