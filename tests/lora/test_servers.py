"""Checks of an adapter against what servers accept; the expected sentences are written out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx
from hra_fx.errors import ConfigError
from hra_fx.layers.target import LayerKind
from hra_fx.lora import servers
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.from_model import lora_adapter

SERVERS = ("vllm", "sglang", "tgi", "tensorrt-llm", "llama.cpp", "ollama")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
#: The linear layers of a Llama of two blocks, by the names that transformers gives them.
LLAMA = tuple(
    f"model.layers.{block}.{part}.{name}"
    for block in (0, 1)
    for part, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name in names
)


def _layer(path: str, kind: LayerKind = "linear") -> LoraLayer:
    return LoraLayer(path, kind, torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))


def check_for_server(server: str, adapter: LoraAdapter, rank: int, **more: Any) -> list[str]:
    """What is said of the format that the server reads."""
    return servers.check_for_server(
        server, adapter, rank, **{"kind": "gguf" if server == "llama.cpp" else "peft"} | more
    )


def _adapter(*paths: str, modules: tuple[str, ...] = LLAMA, **fields: Any) -> LoraAdapter:
    return LoraAdapter(tuple(_layer(path) for path in paths), modules=modules, **fields)


@pytest.mark.parametrize("server", SERVERS)
def test_every_linear_layer_of_a_llama_is_accepted(server: str) -> None:
    assert check_for_server(server, _adapter(*LLAMA), rank=8) == []


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_shared_experts_that_peft_finds_by_a_parameter(server: str) -> None:
    shared = tuple(f"model.layers.1.mlp.shared_experts.{name}" for name in MLP)
    adapter = _adapter(*shared, modules=(*shared, "model.layers.1.mlp.experts"), model_config={"model_type": "dots1"})
    names = ", ".join(f"`{path}`" for path in shared)
    said = f"SGLang 0.5.23 does not load {names}, which PEFT takes for experts in `target_modules`: fold the adapter."
    assert check_for_server(server, adapter, rank=8) == [said] * (server == "sglang")


@pytest.mark.parametrize("server", SERVERS)
def test_an_adapted_llama_of_transformers(server: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    targets = [*ATTENTION, *MLP]
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=targets, bias="hra_only", init_weights=False))
    adapter = lora_adapter(model)
    assert sorted(layer.path for layer in adapter.layers) == sorted(LLAMA)
    (sentence,) = check_for_server(server, adapter, adapter.rank)
    assert "trained biases, here `bias='lora_only'`" in sentence


def test_an_unknown_server_is_an_error_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"`check` must be one of 'vllm', .*'ollama', got 'vlm'\."):
        check_for_server("vlm", _adapter(*LLAMA), rank=8)


@pytest.mark.parametrize(("rank", "value"), [(17, 32), (32, 32), (257, 320), (512, 512)])
def test_vllm_needs_an_option_of_a_fixed_set_of_ranks(rank: int, value: int) -> None:
    (sentence,) = check_for_server("vllm", _adapter(*LLAMA), rank)
    assert sentence.endswith(f"the adapter has {rank}: start it with `--max-lora-rank {value}`.")


def test_vllm_has_a_largest_rank() -> None:
    (sentence,) = check_for_server("vllm", _adapter(*LLAMA), 513)
    assert sentence == (
        "vLLM 0.33.0 accepts ranks up to 512, but the adapter has 513: pass a smaller `rank`, or fold it."
    )


def test_tensorrt_llm_takes_any_rank_by_an_option() -> None:
    assert check_for_server("tensorrt-llm", _adapter(*LLAMA), 64) == []
    (sentence,) = check_for_server("tensorrt-llm", _adapter(*LLAMA), 65)
    assert "`max_lora_rank: 65`" in sentence


@pytest.mark.parametrize("server", ["sglang", "tgi", "llama.cpp", "ollama"])
def test_other_servers_have_no_limit_of_the_rank(server: str) -> None:
    assert check_for_server(server, _adapter(*LLAMA), 1024) == []


@pytest.mark.parametrize(
    ("server", "verb"),
    [
        ("vllm", "refuses"),
        ("sglang", "does not support"),
        ("tgi", "ignores"),
        ("tensorrt-llm", "refuses"),
        ("llama.cpp", "refuses"),
        ("ollama", "refuses"),
    ],
)
def test_trained_biases(server: str, verb: str) -> None:
    (sentence,) = check_for_server(server, _adapter(*LLAMA, bias="lora_only"), 8)
    assert f" {verb} trained biases, here `bias='lora_only'`" in sentence


@pytest.mark.parametrize("server", SERVERS)
def test_modules_to_save(server: str) -> None:
    (sentence,) = check_for_server(server, _adapter(*LLAMA, modules_to_save=("model.norm",)), 8)
    assert "`modules_to_save`, here `model.norm`" in sentence


def test_vllm_loads_classification_heads() -> None:
    assert check_for_server("vllm", _adapter(*LLAMA, modules_to_save=("classifier", "score")), 8) == []


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "attention"])
def test_only_linear_layers(server: str, kind: LayerKind) -> None:
    (sentence,) = check_for_server(server, LoraAdapter((_layer("vision.patch_embedding", kind),)), 8)
    assert f"linear layers only, not `vision.patch_embedding ({kind})`" in sentence


@pytest.mark.parametrize(
    ("server", "path", "accepted"),
    [
        ("vllm", "transformer.h.0.attn.anything", True),
        ("vllm", "lm_head", False),
        ("sglang", "lm_head", True),
        ("sglang", "language_model.model.layers.0.self_attn.o_proj", True),
        ("sglang", "model.layers.0.self_attn.dense", False),
        ("sglang", "transformer.h.0.attn.o_proj", False),
        ("tgi", "model.layers.0.mlp.c_fc", True),
        ("tgi", "lm_head", False),
        ("tgi", "model.decoder.layers.0.self_attn.q_proj", False),
        ("tensorrt-llm", "model.decoder.layers.0.self_attn.q_proj", True),
        ("tensorrt-llm", "model.decoder.layers.0.fc1", False),
        ("tensorrt-llm", "lm_head", False),
        ("llama.cpp", "lm_head", True),
    ],
)
def test_names_of_layers(server: str, path: str, accepted: bool) -> None:
    found = check_for_server(server, _adapter(path, modules=()), 8)
    assert (found == []) if accepted else (len(found) == 1 and f"`{path}`" in found[0])


@pytest.mark.parametrize(
    ("names", "alone", "needed"),
    [
        (("q_proj", "k_proj"), "q_proj", "v_proj"),
        (("v_proj",), "v_proj", "q_proj"),
        (("q_proj", "v_proj", "k_proj"), None, None),
        (("q_proj", "v_proj"), None, None),
    ],
)
def test_sglang_stacks_query_key_and_value(names: tuple[str, ...], alone: str | None, needed: str | None) -> None:
    paths = [f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in names]
    found = check_for_server("sglang", _adapter(*paths), 8)
    if alone is None:
        assert found == []
    else:
        shown = ", ".join(f"`model.layers.{block}.self_attn.{alone}`" for block in (0, 1))
        assert found == [f"SGLang 0.5.23 does not load {shown} without `{needed}` of the same block: adapt both."]


def test_sglang_stacks_gate_and_up_where_the_model_has_both() -> None:
    up, gate = (f"model.layers.0.mlp.{name}" for name in ("up_proj", "gate_proj"))
    assert len(check_for_server("sglang", _adapter(up), 8)) == 1
    assert check_for_server("sglang", _adapter(gate), 8) == []
    assert check_for_server("sglang", _adapter(up, modules=(up,)), 8) == []


def test_sglang_reads_no_regular_expression_in_target_modules() -> None:
    modules = ("lm_head", "tail.lm_head")  # "lm_head" is an end of the other name, so PEFT needs a regular expression
    (sentence,) = check_for_server("sglang", _adapter("lm_head", modules=modules), 8)
    assert "needs a list in `target_modules`" in sentence
    assert check_for_server("sglang", _adapter("tail.lm_head", modules=modules), 8) == []


def test_tgi_needs_every_block() -> None:
    first = [path for path in LLAMA if ".0." in path and "o_proj" not in path]
    (sentence,) = check_for_server("tgi", _adapter(*first), 8)
    assert "`model.layers.1.self_attn.q_proj`" in sentence and sentence.endswith("and 3 more.")


@pytest.mark.parametrize("server", ["llama.cpp", "ollama"])
def test_a_tied_output_layer_has_no_tensor_in_gguf(server: str) -> None:
    (sentence,) = check_for_server(server, _adapter("lm_head", model_config={"tie_word_embeddings": True}), 8)
    assert "has no tensor for `lm_head`" in sentence
    assert check_for_server(server, _adapter("lm_head", model_config={"tie_word_embeddings": False}), 8) == []


def test_several_findings_are_several_sentences() -> None:
    adapter = _adapter("lm_head", bias="all", modules_to_save=("embed",))
    assert len(check_for_server("vllm", adapter, 1000)) == 4


@pytest.mark.parametrize(("server", "count"), [("vllm", 0), ("sglang", 1), ("tgi", 1), ("tensorrt-llm", 1)])
def test_a_rank_for_each_layer(server: str, count: int) -> None:
    found = check_for_server(server, _adapter(*LLAMA), 8, rank_pattern=True)
    assert len(found) == count
    assert all(text.endswith("expects one rank for all layers: omit `rank_pattern`.") for text in found)


@pytest.mark.parametrize(
    ("server", "kind", "formats"),
    [("vllm", "gguf", "peft"), ("sglang", "diffusers", "peft"), ("llama.cpp", "peft", "gguf")],
)
def test_a_format_that_the_server_does_not_read(server: str, kind: str, formats: str) -> None:
    (text,) = check_for_server(server, _adapter(*LLAMA, bias="all"), 1000, kind=kind)
    assert text.endswith(f" reads the format of {formats}, not that of {kind}.")
    assert check_for_server("ollama", _adapter(*LLAMA), 8, kind="gguf") == []


def test_save_as_lora_warns_and_writes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model = hra_fx.transform(model, hra_fx.HRAConfig(r=32, target_modules=["0"], init_weights=False))
    text = "vLLM 0.33.0 accepts ranks up to 16 by default, but the adapter has 32: start it with `--max-lora-rank 32`."
    with pytest.warns(hra_fx.HRAWarning, match=f"^{re.escape(text)}$"):
        result = hra_fx.save_as_lora(model, tmp_path / "out", check="vllm")
    assert result.warnings == (text,)
    assert str(result).endswith(f"\n  warning: {text}")
    with pytest.raises(hra_fx.ConfigError, match=r"^`check` must be one of 'vllm', 'sglang', .*, got 'vlm'\.$"):
        hra_fx.save_as_lora(model, tmp_path / "other", check="vlm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
