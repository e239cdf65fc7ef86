"""GGUF adapters in llama.cpp, against the adapted model in PyTorch: greedy tokens and all their log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from adapting import randomise
from gguf_models import MODELS, VOCABULARY, tiny, write_model
from llama_cpp import Continuation, complete, serve
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx

PROMPT = [1, 50, 77, 120, 9, 20, 33]
COUNT = 12
#: Of a log-probability. Everything is computed in float32, whose rounding errors add up to 4e-6 in these models.
EXACT = 2e-5
#: llama.cpp rounds the inputs of its GELU to half precision (2^-11), where the last bit of float32 can decide. That bit
#: and the random weights depend on the CPU: 5.7e-4 was seen.
TABULATED = 1e-3
_WITH_GELU = ("gemma", "gemma2", "gemma3_text", "gpt2", "phi", "starcoder2")


def tolerance_of(model_type: str) -> float:
    return TABULATED if model_type in _WITH_GELU else EXACT


def linears(model: nn.Module) -> list[str]:
    """The paths of all layers that llama.cpp can adapt."""
    tied = model.config.tie_word_embeddings
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not (tied and path == "lm_head")
    ]


def adapt(model: nn.Module, *targets: str) -> None:
    """Add an adapter that rotates far."""
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=list(targets) or linears(model)))
    randomise(model)


@torch.no_grad()
def log_probabilities(model: nn.Module, continuation: Continuation, prompt: list[int] = PROMPT) -> Tensor:
    """What PyTorch says at each token of a continuation: `(count, vocabulary)`."""
    ids = torch.tensor([prompt + continuation.tokens])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(dim=-1)


def check(model: nn.Module, continuation: Continuation, tolerance: float = EXACT) -> None:
    expected = log_probabilities(model, continuation)
    assert len(continuation.tokens) == COUNT
    assert continuation.tokens == expected.argmax(dim=-1).tolist()
    assert float((continuation.log_probabilities - expected).abs().max()) < tolerance


def answer(base: Path, *adapters: Path) -> Continuation:
    """What llama.cpp says with adapters."""
    return complete(serve(base, *adapters), PROMPT, COUNT, top=VOCABULARY)


def test_hot_swap_of_two_adapters_in_one_server(tmp_path: Path) -> None:
    model = tiny("llama")
    base = write_model(model, tmp_path / "base.gguf")
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=linears(model)), "a")
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    files = {name: tmp_path / f"{name}.gguf" for name in ("a", "b")}
    for name, file in files.items():
        hra_fx.save_as_lora(model, file, name)
    server, said = serve(base, *files.values()), {}
    for turn, name in enumerate("aba"):
        said[f"{name}{turn}"] = complete(server, PROMPT, COUNT, {0: name == "a", 1: name == "b"}, VOCABULARY)
        hra_fx.set_adapter(model, name)
        check(model, said[f"{name}{turn}"])
    neither = complete(server, PROMPT, COUNT, {0: 0.0, 1: 0.0}, VOCABULARY)
    with hra_fx.disable_adapters(model):
        check(model, neither)
    assert len({tuple(answer.tokens) for answer in (said["a0"], said["b1"], neither)}) == 3
    assert said["a0"].tokens == said["a2"].tokens


@pytest.mark.parametrize("model_type", MODELS)
def test_every_layer_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    """Also with an adapter that was not trained, which changes nothing."""
    tolerance = tolerance_of(model_type)
    model = tiny(model_type)
    base = write_model(model, tmp_path / "base.gguf")
    before = answer(base)
    check(model, before, tolerance)
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=linears(model)))
    with pytest.warns(hra_fx.HRAWarning, match="do not change any weight"):
        hra_fx.save_as_lora(model, tmp_path / "fresh.gguf")
    check(model, answer(base, tmp_path / "fresh.gguf"), tolerance)
    randomise(model)
    hra_fx.save_as_lora(model, tmp_path / "adapter.gguf")
    after = answer(base, tmp_path / "adapter.gguf")
    check(model, after, tolerance)
    assert float((after.log_probabilities[0] - before.log_probabilities[0]).abs().max()) > 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """llama.cpp also rounds the inputs of a layer to the dtype of its factors: a relative error of 5e-4, or 4e-3."""
    model = tiny("llama")
    base = write_model(model, tmp_path / "base.gguf")
    adapt(model)
    hra_fx.save_as_lora(model, tmp_path / "adapter.gguf", dtype=dtype)
    said = answer(base, tmp_path / "adapter.gguf")
    assert float((said.log_probabilities - log_probabilities(model, said)).abs().max()) < tolerance
    with hra_fx.disable_adapters(model):
        assert float((said.log_probabilities - log_probabilities(model, said)).abs().max()) > 0.5


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_a_model_without_head(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    base = write_model(model, tmp_path / "base.gguf")
    adapt(model.base_model)
    hra_fx.save_as_lora(model.base_model, tmp_path / "adapter.gguf")
    check(model, answer(base, tmp_path / "adapter.gguf"), tolerance_of(model_type))


def test_the_language_model_of_a_multimodal_model(tmp_path: Path) -> None:
    text = tiny("gemma3_text")
    base = write_model(text, tmp_path / "base.gguf")
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text.config.to_dict(), vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model = text.model
    model.tie_weights()
    adapt(model, *(path for path in linears(model) if ".language_model." in path))
    hra_fx.save_as_lora(model, tmp_path / "adapter.gguf")
    check(model, answer(base, tmp_path / "adapter.gguf"), TABULATED)
