"""LoRA from files: the change of every weight, compared with dense products and the model in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoint.disk import made
from diffusion_models import unet
from moe_models import NAMES, TARGETS, built
from oracles import dense_q, relative_error
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import hra_fx
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.from_files import read_as_lora
from hra_fx.lora.from_model import lora_adapter


def change(layer: LoraLayer) -> Tensor:
    return layer.B @ layer.A


def vectors(folder: Path) -> dict[str, Tensor]:
    """Path of a layer -> its vectors in the file of an adapter."""
    file = load_file(folder / "adapter_model.safetensors")
    keys = {key.removeprefix("base_model.model.").rpartition("."): key for key in file}
    return {path: file[key] for (path, _, last), key in keys.items() if last == "hra_u"}


def found(lora: LoraAdapter) -> dict[str, LoraLayer]:
    return {layer.path: layer for layer in lora.layers}


def check(
    lora: LoraAdapter,
    weights: Mapping[str, Tensor],
    *adapters: Path,
    name: Callable[[str], str] = lambda path: f"{path}.weight",
) -> None:
    """Check that each layer has the change `W Q - W`. `name` maps the path of a layer to the name of its weight."""
    chains = [vectors(folder) for folder in adapters]
    assert set(found(lora)) == {path for own in chains for path in own}
    for path, layer in found(lora).items():
        weight, qs = weights[name(path)], [dense_q(own[path]) for own in chains if path in own]
        rows = weight.double().mT if layer.fan_in_fan_out else weight.double().flatten(1)
        due = torch.linalg.multi_dot([rows, *qs, torch.eye(rows.shape[1], dtype=torch.float64)]) - rows
        assert layer.kernel == tuple(weight.shape[2:])
        assert relative_error(change(layer), due) < (1e-6 if weight.dtype.itemsize == 2 else 1e-12), path


CASES = {**made.CASES, "GPT-2, float64": (made.gpt2, ["c_attn", "c_proj"], torch.float64, {})}
del CASES["Llama, Gram-Schmidt without an anchor"]  # its file has vectors before Gram-Schmidt


@pytest.mark.parametrize("name", CASES)
def test_layers_in_files_and_in_memory(tmp_path: Path, name: str) -> None:
    sharded = name.startswith("Llama")
    build, targets, dtype, fields = CASES[name]
    model = build()
    base = made.base_of(model, tmp_path / "base", dtype, **({"max_shard_size": "6KB"} if sharded else {}))
    assert (len(list(base.glob("*.safetensors"))) > 1) is sharded
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets, **fields)
    lora, weights = read_as_lora([adapter], base), made.tensors(base)
    check(lora, weights, adapter)
    memory = lora_adapter(hra_fx.load_adapter(type(model).from_pretrained(base, dtype="auto"), adapter))
    for path, layer in found(memory).items():
        for field in ("kind", "rank", "kernel", "fan_in_fan_out"):
            assert getattr(layer, field) == getattr(found(lora)[path], field), (path, field)
    for field in ("bias", "modules_to_save", "task_type", "auto_mapping", "base_model"):
        assert getattr(lora, field) == getattr(memory, field), field
    assert lora.copies.keys() == memory.copies.keys()
    assert all(torch.equal(tensor.to(dtype), memory.copies[key].to(dtype)) for key, tensor in lora.copies.items())
    assert lora.model_config["model_type"] == memory.model_config["model_type"]
    assert {path for path in memory.modules if any(key.startswith(f"{path}.") for key in weights)} == set(lora.modules)


#: Output layers that have no tensor in the file, and the tensor that they are tied to.
TIED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "Llama": (lambda: made.llama(tie_word_embeddings=True), "lm_head", "model.embed_tokens.weight"),
    "GPT-2": (made.gpt2, "lm_head", "transformer.wte.weight"),
    "BERT": (made.bert, "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
    "T5": (made.t5, "lm_head", "shared.weight"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_output_layer_has_the_weight_of_the_embeddings(tmp_path: Path, name: str) -> None:
    build, path, source = TIED[name]
    model = build()
    base = made.base_of(model, tmp_path / "base")
    adapter = made.adapter_of(model, tmp_path / "adapter", path.rpartition(".")[2])
    lora, weights = read_as_lora([adapter], base), made.tensors(base)
    assert f"{path}.weight" not in weights and path in lora.modules
    check(lora, weights, adapter, name=lambda _: source)


def test_several_adapters_are_applied_in_their_order(tmp_path: Path) -> None:
    model = made.llama()
    base = made.base_of(model, tmp_path / "base", torch.float32)
    first = made.adapter_of(model, tmp_path / "first", "q_proj", "o_proj", seed=4, bias="hra_only")
    second = made.adapter_of(model, tmp_path / "second", "q_proj", "v_proj", seed=5, r=2, modules_to_save=["lm_head"])
    for adapters in ([first, second], [second, first]):
        lora = read_as_lora(adapters, base)
        check(lora, made.tensors(base), *adapters)
        ranks = {(path.rpartition(".")[2], layer.rank) for path, layer in found(lora).items()}
        assert ranks == {("q_proj", 6), ("o_proj", 4), ("v_proj", 2)}
        assert (lora.bias, lora.modules_to_save, set(lora.copies)) == ("lora_only", ("lm_head",), {"lm_head.weight"})


@pytest.mark.parametrize("apply_GS", [False, True])
def test_a_fresh_adapter_has_rank_0(tmp_path: Path, apply_GS: bool) -> None:
    base = made.base_of(made.llama(), tmp_path / "base")
    fresh = hra_fx.transform(made.llama(), hra_fx.HRAConfig(r=3, target_modules=["q_proj"], apply_GS=apply_GS))
    hra_fx.save_adapter(fresh, tmp_path / "fresh")
    assert [layer.B.shape for layer in read_as_lora([tmp_path / "fresh"], base).layers] == [(16, 0), (16, 0)]


def attention(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 4)})
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def convnext(folder: Path) -> nn.Module:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    model = timm.create_model("convnext_atto", num_classes=5, **sizes)
    save_for_hf(model, folder, safe_serialization=True, model_args=sizes)
    return model


def diffusion(folder: Path) -> nn.Module:
    model: Any = unet()
    return made.base_of(model, folder, torch.float32) and model


#: Targets, and the kinds of the layers.
OTHERS: dict[Callable[[Path], nn.Module], tuple[list[str], set[str]]] = {
    attention: (["attn"], {"attention"}),
    convnext: (["stem.0", "downsample.1"], {"conv2d"}),
    diffusion: (["conv1", "conv_shortcut", "to_q"], {"conv2d", "linear"}),
}


@pytest.mark.parametrize("build", OTHERS)
def test_other_kinds_of_layers(tmp_path: Path, build: Callable[[Path], nn.Module]) -> None:
    targets, kinds = OTHERS[build]
    adapter = made.adapter_of(build(tmp_path / "base"), tmp_path / "adapter", *targets)
    lora = read_as_lora([adapter], tmp_path / "base")
    assert {layer.kind for layer in lora.layers} == kinds
    name = "attn.in_proj_weight" if build is attention else "{}.weight"
    check(lora, made.tensors(tmp_path / "base"), adapter, name=name.format)


def test_an_adapter_with_a_head_for_a_base_without_one(tmp_path: Path) -> None:
    """Names in the file have no prefix; in the adapter and in the result they have one."""
    base = made.base_of(made.bert("BertModel"), tmp_path / "base")
    model = made.bert("BertForSequenceClassification")
    adapter = made.adapter_of(
        model, tmp_path / "adapter", "query", "pooler.dense", task_type="SEQ_CLS", bias="hra_only"
    )
    lora = read_as_lora([adapter], base)
    assert "bert.pooler.dense" in found(lora)
    check(lora, made.tensors(base), adapter, name=lambda path: f"{path.removeprefix('bert.')}.weight")
    biases = {f"{path}.base_layer.bias" for path in found(lora)}
    assert {"classifier.weight", "classifier.bias", *biases} == set(lora.copies)
    modules = {path for path, _ in model.named_modules() if path.startswith("bert.") and "dropout" not in path}
    assert modules - set(lora.modules) <= {path for path in modules if path.endswith(("activation", "act_fn"))}


def test_an_adapter_without_a_head_for_a_base_with_one(tmp_path: Path) -> None:
    base = made.base_of(made.bert(), tmp_path / "base")
    adapter = made.adapter_of(made.bert("BertModel"), tmp_path / "adapter", "query")
    lora = read_as_lora([adapter], base)
    check(lora, made.tensors(base), adapter, name=lambda path: f"bert.{path}.weight")
    assert "encoder.layer.1.attention.self.key" in lora.modules


def test_the_weights_are_from_the_file_that_libraries_load(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights = {name: torch.randn(8, 6) for name in ("consolidated", "model", "model.fp16")}
    for name, weight in weights.items():
        save_file({"0.weight": weight}, tmp_path / "base" / f"{name}.safetensors")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1)
    check(read_as_lora([adapter], tmp_path / "base"), {"0.weight": weights["model"]}, adapter)


@pytest.mark.parametrize(("name", "fields"), [*zip(NAMES, itertools.cycle([{}, {"apply_GS": True}]), strict=False)])
def test_experts_in_files_and_in_memory(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    rank = 3 if fields else None
    model: Any = built(name, torch.float32)
    base = made.base_of(model, tmp_path / "base", torch.float32)
    adapter = made.adapter_of(model, tmp_path / "adapter", "o_proj", target_parameters=TARGETS, **fields)
    loaded = hra_fx.load_adapter(type(model).from_pretrained(base, dtype="auto"), adapter)
    wanted = found(lora_adapter(loaded, None, rank))
    lora = found(read_as_lora([adapter], base, rank=rank, progress=False))
    assert lora.keys() == wanted.keys()
    for path, layer in lora.items():
        other = wanted[path]
        assert (layer.kind, layer.place, layer.rank) == (other.kind, other.place, other.rank), path
        # The file has orthonormal vectors in float32, and the model computes them in float64.
        assert relative_error(change(layer), change(other)) < (1e-6 if fields else 1e-11), path
