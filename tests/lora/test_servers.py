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
from hra_fx.layers.target import LayerKind
from hra_fx.lora import servers
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.from_model import lora_adapter

SERVERS = ("vllm", "sglang", "tgi", "tensorrt-llm", "llama.cpp", "ollama")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PARTS = (("self_attn", ATTENTION), ("mlp", MLP))
#: The linear layers of a Llama of two blocks, by the names that transformers gives them.
LLAMA = tuple(f"model.layers.{block}.{part}.{name}" for block in (0, 1) for part, names in PARTS for name in names)


def adapter(*paths: str, modules: tuple[str, ...] = LLAMA, kind: LayerKind = "linear", **fields: Any) -> LoraAdapter:
    A, B = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    return LoraAdapter(tuple(LoraLayer(path, kind, A, B) for path in paths), modules=modules, **fields)


def check(server: str, found: LoraAdapter | None = None, rank: int = 8, **more: Any) -> list[str]:
    """What is said of an adapter of all layers, or of another one, in the format that the server reads."""
    options = {"file_format": "gguf" if server == "llama.cpp" else "peft"} | more
    return servers.check_for_server(server, adapter(*LLAMA) if found is None else found, rank, **options)


@pytest.mark.parametrize("server", SERVERS)
def test_the_linear_layers_of_a_llama_are_accepted_and_its_biases_are_not(server: str) -> None:
    assert check(server) == []
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    targets = [*ATTENTION, *MLP]
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=targets, bias="hra_only", init_weights=False))
    found = lora_adapter(model)
    assert sorted(layer.path for layer in found.layers) == sorted(LLAMA)
    (sentence,) = check(server, found)
    verb = {"sglang": "does not support", "tgi": "ignores"}.get(server, "refuses")
    assert f" {verb} trained biases, here `bias='lora_only'`" in sentence


@pytest.mark.parametrize("server", SERVERS)
def test_modules_to_save_other_kinds_of_layers_and_ranks(server: str) -> None:
    (sentence,) = check(server, adapter(*LLAMA, modules_to_save=("model.norm",)))
    assert "`modules_to_save`, here `model.norm`" in sentence
    heads = check(server, adapter(*LLAMA, modules_to_save=("classifier", "score")))
    assert len(heads) == (server != "vllm")
    for kind in ("conv1d", "conv2d", "conv3d", "attention"):
        (sentence,) = check(server, adapter("vision.patch_embedding", kind=kind))
        assert f"linear layers only, not `vision.patch_embedding ({kind})`" in sentence
    assert len(check(server, rank=1024)) == (server in ("vllm", "tensorrt-llm"))
    if server != "llama.cpp":
        each = check(server, rank_pattern=True)
        assert len(each) == (server != "vllm")
        assert all(text.endswith("expects one rank for all layers: omit `rank_pattern`.") for text in each)
    head = check(server, adapter("lm_head", modules=(), model_config={"tie_word_embeddings": True}))
    assert any("has no tensor for `lm_head`" in text for text in head) is (server in ("llama.cpp", "ollama"))


#: Server and rank -> the end of what is said.
RANKS = {
    **{
        ("vllm", rank): f"the adapter has {rank}: start it with `--max-lora-rank {value}`."
        for rank, value in {17: 32, 32: 32, 257: 320, 512: 512}.items()
    },
    ("vllm", 513): "the adapter has 513: pass a smaller `rank`, or fold it.",
    ("tensorrt-llm", 65): "the adapter has 65: set `max_lora_rank: 65` in its `lora_config`.",
}


def test_ranks() -> None:
    assert check("tensorrt-llm", rank=64) == check("vllm", rank=16) == []
    for (server, rank), wanted in RANKS.items():
        (sentence,) = check(server, rank=rank)
        assert sentence.endswith(wanted)


@pytest.mark.parametrize(
    ("server", "path", "accepted"),
    [
        ("vllm", "transformer.h.0.attn.anything", True),
        ("vllm", "lm_head", False),
        ("sglang", "lm_head", True),
        ("sglang", "model.layers.0.self_attn.dense", False),
        ("tgi", "model.layers.0.mlp.c_fc", True),
        ("tgi", "model.decoder.layers.0.self_attn.q_proj", False),
        ("tensorrt-llm", "model.decoder.layers.0.self_attn.q_proj", True),
        ("tensorrt-llm", "lm_head", False),
        ("llama.cpp", "lm_head", True),
    ],
)
def test_names_of_layers(server: str, path: str, accepted: bool) -> None:
    found = check(server, adapter(path, modules=()))
    assert (found == []) if accepted else (len(found) == 1 and f"`{path}`" in found[0])


@pytest.mark.parametrize(
    ("part", "names", "said"),
    [
        ("self_attn", ("q_proj", "k_proj"), {"q_proj": "v_proj"}),
        ("self_attn", ("v_proj",), {"v_proj": "q_proj"}),
        ("self_attn", ("q_proj", "v_proj"), {}),
        ("mlp", ("up_proj",), {"up_proj": "gate_proj"}),
    ],
)
def test_sglang_stacks_layers(part: str, names: tuple[str, ...], said: dict[str, str]) -> None:
    paths = [f"model.layers.{block}.{part}.{name}" for block in (0, 1) for name in names]
    shown = {name: ", ".join(f"`model.layers.{block}.{part}.{name}`" for block in (0, 1)) for name in said}
    assert check("sglang", adapter(*paths)) == [
        f"SGLang 0.5.23 does not load {shown[name]} without `{needed}` of the same block: adapt both."
        for name, needed in said.items()
    ]
    assert check("sglang", adapter(*paths, modules=tuple(paths))) == []  # the model has no other


def test_sglang_reads_neither_regular_expressions_nor_parameters() -> None:
    modules = ("lm_head", "tail.lm_head")  # "lm_head" is an end of the other name, so PEFT needs a regular expression
    (sentence,) = check("sglang", adapter("lm_head", modules=modules))
    assert "needs a list in `target_modules`" in sentence
    assert check("sglang", adapter("tail.lm_head", modules=modules)) == []
    shared = tuple(f"model.layers.1.mlp.shared_experts.{name}" for name in MLP)
    found = adapter(*shared, modules=(*shared, "model.layers.1.mlp.experts"), model_config={"model_type": "dots1"})
    (sentence,) = check("sglang", found)
    assert "but PEFT needs a regular expression or `target_parameters`" in sentence
    assert check("vllm", found) == []


def test_tgi_needs_every_block() -> None:
    first = [path for path in LLAMA if ".0." in path and "o_proj" not in path]
    (sentence,) = check("tgi", adapter(*first))
    assert "`model.layers.1.self_attn.q_proj`" in sentence and sentence.endswith("and 3 more.")


@pytest.mark.parametrize(
    ("server", "file_format", "formats"),
    [("vllm", "gguf", "peft"), ("sglang", "diffusers", "peft"), ("llama.cpp", "peft", "gguf")],
)
def test_a_format_that_the_server_does_not_read(server: str, file_format: str, formats: str) -> None:
    (text,) = check(server, adapter(*LLAMA, bias="all"), 1000, file_format=file_format)
    assert text.endswith(f" reads the format of {formats}, not that of {file_format}.")
    assert check("ollama", file_format="gguf") == []


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
