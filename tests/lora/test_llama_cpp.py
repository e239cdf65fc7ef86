"""GGUF adapters: their content, errors, and llama.cpp compared with the adapted model in PyTorch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from adapting import randomise
from diffusion_pipelines import unet
from lora.gguf_models import MODELS, VOCABULARY, Continuation, complete, serve, tiny, write_model
from tiny import bert
from torch import Tensor, nn

import hra_fx


def adapted(*targets: str, model: Any = None, **fields: Any) -> Any:
    model = tiny("llama") if model is None else model
    return hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=list(targets), init_weights=False, **fields))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_llama_cpp_reads(dtype: str, tmp_path: Path) -> None:
    """Fields, names and factors."""
    model = adapted("up_proj", "down_proj", rank_pattern={"up_proj": 2})
    result = hra_fx.save_as_lora(model, tmp_path / "a.GGUF", dtype=dtype)
    read = gguf.GGUFReader(tmp_path / "a.GGUF")
    assert {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    assert (result.format, result.rank) == ("gguf", 4)
    factors = hra_fx.convert_to_lora(model)[1]
    found = {tensor.name: tensor for tensor in read.tensors}
    names = {"ffn_up": "up_proj", "ffn_down": "down_proj"}
    for i, (theirs, ours), side in itertools.product(range(2), names.items(), "ab"):
        tensor = found.pop(f"blk.{i}.{theirs}.weight.lora_{side}")
        assert tensor.tensor_type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        wanted = factors[f"base_model.model.model.layers.{i}.mlp.{ours}.lora_{side.upper()}.weight"]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(values, wanted.to(getattr(torch, dtype)).float(), rtol=1e-2, atol=1e-6)
    assert not found


def out_of_range() -> Any:
    model = adapted("up_proj")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.hra_base.mul_(1e12)
    return model


#: The model or pipeline, the error and its message.
REFUSED: dict[str, tuple[Callable[[], Any], type[hra_fx.HRAError], str]] = {
    "an unknown architecture": (
        lambda: adapted("query", model=bert()),
        hra_fx.AdapterError,
        r"^GGUF adapters are written for the model types gemma3, .*, smollm3, got 'bert'\. Save the LoRA in a folder",
    ),
    "a layer that llama.cpp does not have": (
        lambda: adapted("score", model=transformers.LlamaForSequenceClassification(tiny("llama").config)),
        hra_fx.UnsupportedLayerError,
        "^score: llama.cpp has no weight for this linear layer in 'llama', so a GGUF adapter cannot change it",
    ),
    "a trained module": (
        lambda: adapted("up_proj", modules_to_save=["model.norm"]),
        hra_fx.AdapterError,
        "^model.norm.weight: a GGUF adapter cannot have biases or modules_to_save",
    ),
    "a value out of the range of float16": (
        out_of_range,
        hra_fx.AdapterError,
        "^model.layers.0.mlp.up_proj: its factors are out of the range of torch.float16. Use float32",
    ),
    "a model of diffusers": (
        lambda: adapted("to_q", model=unet()),
        hra_fx.AdapterError,
        r"a\.gguf: GGUF files are for language models, .*, got UNet2DConditionModel\. Pass a folder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, error, message = REFUSED[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        hra_fx.save_as_lora(make(), path, dtype="float16")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(hra_fx.CheckpointError, match=r"which is not installed\. Run: pip install gguf\.$"):
        hra_fx.save_as_lora(adapted("q_proj"), tmp_path / "a.gguf")


PROMPT = [1, 50, 77, 120, 9, 20, 33]
COUNT = 12
#: Tolerance of log-probabilities. Everything is float32, whose rounding errors add up to 4e-6 in these models.
EXACT = 2e-5
#: llama.cpp rounds the inputs of its GELU to half precision (2^-11), and the last bit of float32 can change the result.
#: This bit and the random weights depend on the CPU: 5.7e-4 was measured.
TABULATED = 1e-3


def linears(model: nn.Module) -> list[str]:
    """The paths of all layers that llama.cpp can adapt."""
    tied = model.config.tie_word_embeddings
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (tied and path == "lm_head")
    ]


def adapt(model: nn.Module, *targets: str) -> None:
    """Add an adapter with random vectors."""
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=list(targets) or linears(model)))
    randomise(model, seed=3)  # with this seed, no model ends its text early


@torch.no_grad()
def check(model: nn.Module, continuation: Continuation, tolerance: float = EXACT) -> None:
    """Compare with PyTorch's log-probabilities at each token of the continuation."""
    ids = torch.tensor([PROMPT + continuation.tokens])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.double().log_softmax(dim=-1)
    assert len(continuation.tokens) == COUNT
    assert continuation.tokens == expected.argmax(dim=-1).tolist()
    assert float((continuation.log_probabilities - expected).abs().max()) < tolerance


def answer(base: Path, *adapters: Path) -> Continuation:
    """llama.cpp's continuation with adapters."""
    return complete(serve(base, *adapters), PROMPT, COUNT, VOCABULARY)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_layer_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    tolerance = TABULATED if model_type == "gemma3_text" else EXACT
    model = tiny(model_type)
    base = write_model(model, tmp_path / "base.gguf")
    before = answer(base)
    check(model, before, tolerance)
    part = model.base_model if model_type == "qwen2" else model  # a model without its head has other paths
    adapt(part)
    hra_fx.save_as_lora(part, tmp_path / "adapter.gguf")
    after = answer(base, tmp_path / "adapter.gguf")
    check(model, after, tolerance)
    assert float((after.log_probabilities[0] - before.log_probabilities[0]).abs().max()) > 0.2


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
