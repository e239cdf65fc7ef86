"""GGUF adapters: their content, errors, and llama.cpp compared with the adapted model in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers
from adapting import randomise
from gguf_models import MODELS, VOCABULARY, tiny, write_model
from llama_cpp import Continuation, complete, serve
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.gguf_format import ARCHITECTURES, is_tied, write_gguf

LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}


def layer(path: str, rank: int = 1, out: int = 8, **fields: Any) -> LoraLayer:
    torch.manual_seed(0)
    factors = {"A": torch.randn(rank, 8).double(), "B": torch.randn(out, rank).double()}
    return LoraLayer(**{"path": path, "kind": "linear"} | factors | fields)


def adapter(*layers: LoraLayer, config: Mapping[str, Any] = LLAMA, **fields: Any) -> LoraAdapter:
    return LoraAdapter(layers, model_config=config, **fields)


def write(path: Path, *layers: LoraLayer, dtype: torch.dtype = torch.float32, **fields: Any) -> dict[str, Any]:
    """Write an adapter, and read its tensors."""
    write_gguf(adapter(*layers, **fields), path, dtype)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_fields_that_llama_cpp_reads(tmp_path: Path) -> None:
    """The name of a base model in a folder has no path."""
    for base in ("someone/llama", str(tmp_path / "my-llama")):
        write(tmp_path / "new" / "a.gguf", layer("model.layers.11.mlp.up_proj", 3), base_model=base)
        read = gguf.GGUFReader(tmp_path / "new" / "a.gguf").fields
        assert {key: field.contents() for key, field in read.items() if not key.startswith("GGUF.")} == {
            "general.architecture": "llama",
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 3.0,
            "general.base_model.count": 1,
            "general.base_model.0.name": base.removeprefix(f"{tmp_path}/"),
        }
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_all_factors_have_one_rank_and_the_dtype(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    low, high = layer("model.layers.11.mlp.up_proj", 1), layer("model.layers.2.mlp.down_proj", 3)
    tensors = write(tmp_path / "a.gguf", low, high, dtype=dtype)
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {name}
    values = {key: torch.tensor(gguf.quants.dequantize(each.data, each.tensor_type)) for key, each in tensors.items()}
    a, b = values["blk.11.ffn_up.weight.lora_a"], values["blk.11.ffn_up.weight.lora_b"]
    assert (a.shape, b.shape) == ((3, 8), (8, 3))
    torch.testing.assert_close(b @ a, low.B.to(dtype).float() @ low.A.to(dtype).float())
    assert torch.equal(values["blk.2.ffn_down.weight.lora_a"], high.A.to(dtype).float())


def test_every_supported_architecture_is_tested() -> None:
    assert {*MODELS, "gemma3"} == {*ARCHITECTURES}  # gemma3 has a vision tower


REFUSED = {
    "an unknown architecture": (
        adapter(layer("bert.encoder.layer.0.attention.self.query"), config={"model_type": "bert"}),
        hra_fx.AdapterError,
        r"GGUF adapters can be written for the model types gemma, .*, starcoder2, got 'bert'\. Fold the model",
    ),
    "a layer that llama.cpp does not have": (
        adapter(layer("score")),
        hra_fx.UnsupportedLayerError,
        "^score: llama.cpp has no weight for this linear layer of a model of type 'llama'",
    ),
    "a tied output layer": (
        adapter(layer("lm_head"), config=LLAMA | {"tie_word_embeddings": True}),
        hra_fx.UnsupportedLayerError,
        "^lm_head: this layer is tied to the embeddings",
    ),
    "a bias": (
        adapter(layer("model.layers.0.mlp.up_proj"), copies={"model.layers.0.mlp.up_proj.bias": torch.zeros(8)}),
        hra_fx.AdapterError,
        "^model.layers.0.mlp.up_proj.bias: a GGUF adapter can only change weights of layers, not biases",
    ),
    "a value out of the range of float16": (
        adapter(layer("model.layers.0.mlp.up_proj", A=torch.full((1, 8), 1e6, dtype=torch.float64))),
        hra_fx.AdapterError,
        "^model.layers.0.mlp.up_proj: its factors are out of the range of torch.float16. Use float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    found, error, message = REFUSED[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        write_gguf(found, path, torch.float16)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def adapted(*targets: str, model: Any = None, **fields: Any) -> Any:
    model = tiny("llama") if model is None else model
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=list(targets), init_weights=False, **fields))
    return model


def test_models_and_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, kind: type[hra_fx.HRAError], message: str, name: str = "a.gguf", **options: Any) -> None:
        with pytest.raises(kind, match=message):
            hra_fx.save_as_lora(model, tmp_path / name, **options)

    model, pipe = adapted("q_proj"), SimpleNamespace(components={})
    refused(pipe, hra_fx.AdapterError, r"^GGUF files are for language models, got SimpleNamespace\. Pass a fold")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    said = r"a\.gguf: cannot write the file \((File exists|Not a directory)\)\."
    refused(model, hra_fx.CheckpointError, said, "file/a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(model, hra_fx.CheckpointError, r"which is not installed\. Run: pip install gguf\.$")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_which_model_types_tie_their_output_layer(model_type: str) -> None:
    """A `config.json` may omit a setting that is the default of the class."""
    config = transformers.AutoConfig.for_model(model_type).get_text_config()
    assert is_tied(adapter(config={"model_type": model_type})) == config.tie_word_embeddings
    assert not is_tied(adapter(config={"model_type": model_type, "text_config": {"tie_word_embeddings": False}}))


def test_the_result_says_what_was_written(tmp_path: Path) -> None:
    """Also with an uppercase suffix, and a symbolic link, which is kept."""
    (tmp_path / "link.GGUF").symlink_to(tmp_path / "a.gguf")
    result = hra_fx.save_as_lora(adapted("q_proj"), tmp_path / "link.GGUF", rank=2)
    assert (result.format, result.rank) == ("gguf", 2)
    assert all(0 < row.error < 1 for row in result.rows)
    assert (tmp_path / "link.GGUF").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "link.GGUF"]


PROMPT = [1, 50, 77, 120, 9, 20, 33]
COUNT = 12
#: Tolerance of log-probabilities. Everything is float32, whose rounding errors add up to 4e-6 in these models.
EXACT = 2e-5
#: llama.cpp rounds the inputs of its GELU to half precision (2^-11), and the last bit of float32 can change the result.
#: This bit and the random weights depend on the CPU: 5.7e-4 was measured.
TABULATED = 1e-3
_WITH_GELU = ("gemma", "gemma2", "gemma3_text", "gpt2", "phi", "starcoder2")


def linears(model: nn.Module) -> list[str]:
    """The paths of all layers that llama.cpp can adapt."""
    tied = model.config.tie_word_embeddings
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not (tied and path == "lm_head")
    ]


def adapt(model: nn.Module, *targets: str) -> None:
    """Add an adapter with random vectors."""
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=list(targets) or linears(model)))
    randomise(model, seed=3)  # with this seed, no model ends its text early


@torch.no_grad()
def log_probabilities(model: nn.Module, continuation: Continuation, prompt: list[int] = PROMPT) -> Tensor:
    """PyTorch's log-probabilities at each token of a continuation: `(count, vocabulary)`."""
    ids = torch.tensor([prompt + continuation.tokens])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(dim=-1)


def check(model: nn.Module, continuation: Continuation, tolerance: float = EXACT) -> None:
    expected = log_probabilities(model, continuation)
    assert len(continuation.tokens) == COUNT
    assert continuation.tokens == expected.argmax(dim=-1).tolist()
    assert float((continuation.log_probabilities - expected).abs().max()) < tolerance


def answer(base: Path, *adapters: Path) -> Continuation:
    """llama.cpp's continuation with adapters."""
    return complete(serve(base, *adapters), PROMPT, COUNT, VOCABULARY)


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
        said[f"{name}{turn}"] = complete(server, PROMPT, COUNT, VOCABULARY, {0: name == "a", 1: name == "b"})
        hra_fx.set_adapter(model, name)
        check(model, said[f"{name}{turn}"])
    neither = complete(server, PROMPT, COUNT, VOCABULARY, {0: 0.0, 1: 0.0})
    with hra_fx.disable_adapters(model):
        check(model, neither)
    assert len({tuple(answer.tokens) for answer in (said["a0"], said["b1"], neither)}) == 3
    assert said["a0"].tokens == said["a2"].tokens


@pytest.mark.parametrize("model_type", MODELS)
def test_every_layer_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    tolerance = TABULATED if model_type in _WITH_GELU else EXACT
    model = tiny(model_type)
    base = write_model(model, tmp_path / "base.gguf")
    before = answer(base)
    check(model, before, tolerance)
    adapt(model)
    hra_fx.save_as_lora(model, tmp_path / "adapter.gguf")
    after = answer(base, tmp_path / "adapter.gguf")
    check(model, after, tolerance)
    assert float((after.log_probabilities[0] - before.log_probabilities[0]).abs().max()) > 0.5


def test_a_model_without_head(tmp_path: Path) -> None:
    model = tiny("llama")
    base = write_model(model, tmp_path / "base.gguf")
    adapt(model.base_model)
    hra_fx.save_as_lora(model.base_model, tmp_path / "adapter.gguf")
    check(model, answer(base, tmp_path / "adapter.gguf"))


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
