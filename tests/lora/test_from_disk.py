"""Adapters read from disk: the change of every weight, by dense products and by the model in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from checkpoint.disk import made
from diffusion_models import unet
from moe_models import NAMES, TARGETS, built, call_of
from oracles import dense_q, relative_error
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import hra_fx
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.disk.convert import convert_files
from hra_fx.lora.disk.read import read_as_lora
from hra_fx.lora.from_model import lora_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
U = "base_model.model.{}.hra_u"
#: Relative errors of products with 16-bit weights, which are in float32, and of others, which are in float64.
NEAR = {torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float32: 1e-12, torch.float64: 1e-12}


def change(layer: LoraLayer) -> Tensor:
    return layer.B @ layer.A


def vectors(folder: Path, path: str) -> Tensor:
    return load_file(folder / "adapter_model.safetensors")[U.format(path)]


def dense_change(weight: Tensor, *qs: Tensor, columns: bool = False) -> Tensor:
    """`W Q - W: (out, d)` in float64."""
    rows = weight.double().mT if columns else weight.double().flatten(1)
    q = torch.linalg.multi_dot([*qs, torch.eye(len(qs[0]), dtype=torch.float64)])
    return rows @ q - rows


def found(lora: LoraAdapter) -> dict[str, LoraLayer]:
    return {layer.path: layer for layer in lora.layers}


CASES = {**made.CASES, "GPT-2, float64": (made.gpt2, ["c_attn", "c_proj"], torch.float64, {})}
del CASES["Llama, Gram-Schmidt without an anchor"]  # its file has vectors before Gram-Schmidt, see `vectors`
#: Output layers without a tensor of their own, and the one that they are tied to.
TIED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "Llama": (lambda: made.llama(tie_word_embeddings=True), "lm_head", "model.embed_tokens.weight"),
    "GPT-2": (made.gpt2, "lm_head", "transformer.wte.weight"),
    "BERT": (made.bert, "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
    "T5": (made.t5, "lm_head", "shared.weight"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_as_of_the_model_in_memory(tmp_path: Path, name: str, sharded: bool) -> None:
    build, targets, dtype, fields = CASES[name]
    model = build()
    base = made.base_of(model, tmp_path / "base", dtype, **({"max_shard_size": "6KB"} if sharded else {}))
    assert (len(list(base.glob("*.safetensors"))) > 1) is sharded
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets, **fields)
    lora, weights = read_as_lora([adapter], base), made.tensors(base)
    for layer in lora.layers:
        due = dense_change(
            weights[f"{layer.path}.weight"], dense_q(vectors(adapter, layer.path)), columns=layer.columns
        )
        assert relative_error(change(layer), due) < NEAR[dtype], layer.path
    memory = lora_adapter(hra_fx.load_adapter(type(model).from_pretrained(base, dtype="auto"), adapter))
    assert [(x.path, x.kind, x.rank, x.kernel, x.columns) for x in lora.layers] == [
        (x.path, x.kind, x.rank, x.kernel, x.columns) for x in sorted(memory.layers, key=lambda x: order(x.path))
    ]
    for field in ("bias", "modules_to_save", "task_type", "auto_mapping", "base_model"):
        assert getattr(lora, field) == getattr(memory, field), field
    assert lora.copies.keys() == memory.copies.keys()
    assert all(torch.equal(tensor.to(dtype), memory.copies[key].to(dtype)) for key, tensor in lora.copies.items())
    assert lora.model_config["model_type"] == memory.model_config["model_type"]
    assert {path for path in memory.modules if any(key.startswith(f"{path}.") for key in weights)} == set(lora.modules)


def order(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in path.split(".")]


@pytest.mark.parametrize("name", TIED)
def test_a_tied_output_layer_has_the_weight_of_the_embeddings(tmp_path: Path, name: str) -> None:
    build, path, source = TIED[name]
    model = build()
    base = made.base_of(model, tmp_path / "base")
    adapter = made.adapter_of(model, tmp_path / "adapter", path.rpartition(".")[2])
    lora, weights = read_as_lora([adapter], base), made.tensors(base)
    assert f"{path}.weight" not in weights and path in lora.modules
    due = dense_change(weights[source], dense_q(vectors(adapter, path)))
    assert relative_error(change(found(lora)[path]), due) < 1e-6


def test_several_adapters_are_applied_in_their_order(tmp_path: Path) -> None:
    model = made.llama()
    base = made.base_of(model, tmp_path / "base", torch.float32)
    first = made.adapter_of(model, tmp_path / "first", "q_proj", "o_proj", seed=4, bias="hra_only")
    second = made.adapter_of(model, tmp_path / "second", "q_proj", "v_proj", seed=5, r=2, modules_to_save=["lm_head"])
    weights = made.tensors(base)
    for adapters in ([first, second], [second, first]):
        lora = read_as_lora(adapters, base)
        assert len(lora.layers) == 6
        for path, layer in found(lora).items():
            file = "adapter_model.safetensors"
            qs = [dense_q(vectors(a, path)) for a in adapters if U.format(path) in load_file(a / file)]
            assert layer.rank == (6 if path.endswith("q_proj") else 4 if path.endswith("o_proj") else 2)
            assert relative_error(change(layer), dense_change(weights[f"{path}.weight"], *qs)) < 1e-12
        assert (lora.bias, lora.modules_to_save, set(lora.copies)) == ("lora_only", ("lm_head",), {"lm_head.weight"})


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_adapters_of_peft(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = made.llama(attention_bias=True)
    base = made.base_of(model, tmp_path / "base", torch.float32, max_shard_size="6KB")
    torch.manual_seed(3)
    config = peft.HRAConfig(**{"r": 3, "target_modules": ["q_proj", "gate_proj"], "init_weights": False, **fields})
    wrapped: Any = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    lora, weights = read_as_lora([tmp_path / "adapter"], base), made.tensors(base)
    merged = wrapped.merge_and_unload().state_dict()
    assert len(lora.layers) == 4
    for path, layer in found(lora).items():
        assert layer.rank == 3
        before = weights[f"{path}.weight"].double()
        assert relative_error(before + change(layer), merged[f"{path}.weight"]) < 1e-6
    saved = {"lm_head.weight"} if "modules_to_save" in fields else set()
    biases = {f"model.layers.{i}.self_attn.{n}_proj.bias" for i in range(2) for n in "kvo"}
    biases |= {f"model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in range(2)}
    assert set(lora.copies) == (biases if "bias" in fields else saved)


def test_a_smaller_rank_is_the_best_approximation(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "base", layers=1, dtype=torch.float64)
    made.stack_adapter(tmp_path / "adapter", layers=1, r=4)
    lora = read_as_lora([tmp_path / "adapter"], tmp_path / "base", rank=2, columns=[])
    due = dense_change(made.tensors(tmp_path / "base")["0.weight"], dense_q(vectors(tmp_path / "adapter", "0")))
    lost = float(torch.linalg.svdvals(due)[2:].norm() / due.norm())
    assert lora.layers[0].rank == 2 and lora.layers[0].error == pytest.approx(lost, rel=1e-9)
    assert relative_error(change(lora.layers[0]), due) == pytest.approx(lost, rel=1e-9)


def test_a_fresh_adapter_has_rank_0(tmp_path: Path) -> None:
    model = made.llama()
    base = made.base_of(model, tmp_path / "base")
    for i, apply_GS in enumerate([False, True]):
        fresh = hra_fx.transform(made.llama(), hra_fx.HRAConfig(r=3, target_modules=["q_proj"], apply_GS=apply_GS))
        hra_fx.save_adapter(fresh, tmp_path / f"{i}")
        lora = read_as_lora([tmp_path / f"{i}"], base)
        assert [layer.rank for layer in lora.layers] == [0, 0] and lora.layers[0].B.shape == (16, 0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)


def test_an_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = made.adapter_of(model, tmp_path / "adapter", "attn")
    (layer,) = read_as_lora([adapter], tmp_path / "base").layers
    assert (layer.path, layer.kind, layer.rank) == ("attn", "attention", 4)
    due = dense_change(model.attn.in_proj_weight.detach(), dense_q(vectors(adapter, "attn")))
    assert relative_error(change(layer), due) < 1e-12


def convnext(folder: Path) -> nn.Module:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    model = timm.create_model("convnext_atto", num_classes=5, **sizes)
    save_for_hf(model, folder, safe_serialization=True, model_args=sizes)
    return model


def resnet(folder: Path) -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    return made.base_of(model, folder, torch.float32) and model


def diffusion(folder: Path) -> nn.Module:
    model: Any = unet()
    return made.base_of(model, folder, torch.float32) and model


CONVOLUTIONS: dict[str, tuple[Callable[[Path], nn.Module], list[str]]] = {
    "timm": (convnext, ["stem.0", "downsample.1"]),
    "transformers": (resnet, ["convolution"]),
    "diffusers": (diffusion, ["conv1", "conv_shortcut", "to_q"]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(tmp_path: Path, name: str) -> None:
    build, targets = CONVOLUTIONS[name]
    model = build(tmp_path / "base")
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets)
    lora, weights = read_as_lora([adapter], tmp_path / "base"), made.tensors(tmp_path / "base")
    assert "conv2d" in {layer.kind for layer in lora.layers}
    for path, layer in found(lora).items():
        weight = weights[f"{path}.weight"]
        assert layer.kernel == tuple(weight.shape[2:]) and layer.kind == ("conv2d" if layer.kernel else "linear")
        assert relative_error(change(layer), dense_change(weight, dense_q(vectors(adapter, path)))) < 1e-12


def test_an_adapter_with_a_head_for_a_base_without_one(tmp_path: Path) -> None:
    """Names in the file have no prefix; in the adapter and in the result they have one."""
    body = made.bert("BertModel")
    base = made.base_of(body, tmp_path / "base")
    model = made.bert("BertForSequenceClassification")
    adapter = made.adapter_of(
        model, tmp_path / "adapter", "query", "pooler.dense", task_type="SEQ_CLS", bias="hra_only"
    )
    lora, weights = read_as_lora([adapter], base), made.tensors(base)
    assert "bert.pooler.dense" in found(lora)
    for path, layer in found(lora).items():
        due = dense_change(weights[f"{path.removeprefix('bert.')}.weight"], dense_q(vectors(adapter, path)))
        assert relative_error(change(layer), due) < 1e-6
        assert f"{path}.base_layer.bias" in lora.copies
    assert {"classifier.weight", "classifier.bias"} < set(lora.copies)
    modules = {path for path, _ in model.named_modules() if path.startswith("bert.") and "dropout" not in path}
    assert modules - set(lora.modules) <= {path for path in modules if path.endswith(("activation", "act_fn"))}


def test_an_adapter_without_a_head_for_a_base_with_one(tmp_path: Path) -> None:
    base = made.base_of(made.bert(), tmp_path / "base")
    model = made.bert("BertModel")
    adapter = made.adapter_of(model, tmp_path / "adapter", "query")
    lora, weights = read_as_lora([adapter], base), made.tensors(base)
    for path, layer in found(lora).items():
        assert path.startswith("encoder.")
        due = dense_change(weights[f"bert.{path}.weight"], dense_q(vectors(adapter, path)))
        assert relative_error(change(layer), due) < 1e-6
    assert "encoder.layer.1.attention.self.key" in lora.modules


def test_the_weights_are_from_the_file_that_libraries_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    weights = {name: torch.randn(8, 6) for name in ("consolidated", "model", "model.fp16")}
    for name, weight in weights.items():
        save_file({"0.weight": weight}, tmp_path / "base" / f"{name}.safetensors")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1)
    (layer,) = read_as_lora([adapter], tmp_path / "base").layers
    assert relative_error(change(layer), dense_change(weights["model"], dense_q(vectors(adapter, "0")))) < 1e-12


MEASURE = """
import sys
from hra_fx.lora.disk.convert import convert_files
from hra_fx.lora.disk.read import read_as_lora
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
read_as_lora([sys.argv[1]], sys.argv[3], progress=False)
before = peak()
read_as_lora([sys.argv[2]], sys.argv[3], progress=False)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [False, True])
def test_a_large_weight_is_never_converted_as_a_whole(tmp_path: Path, columns: bool) -> None:
    width, out = 4096, 8192
    (tmp_path / "base").mkdir()
    weights = {"0.weight": (out, width), "1.weight": (16, 8)}
    state = {name: torch.randn(shape[::-1] if columns else shape).bfloat16() for name, shape in weights.items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    for i, size in enumerate((width, 8)):
        folder = made.stack_adapter(tmp_path / f"{i}", layers=1)
        save_file({U.format(i): torch.randn(size, 2)}, folder / "adapter_model.safetensors")
        hra_fx.HRAConfig(r=2, target_modules=[str(i)]).save_pretrained(folder)
    # The small layer first, so that everything that a call needs once is there.
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *(str(tmp_path / name) for name in ("1", "0", "base"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # The pages of the file are mapped, and the products are of a wider dtype.
    assert int(done.stdout) < 4 * out * width, "the weight in float32"


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True, "rank": 3}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_experts_are_those_of_the_model_in_memory(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model: Any = built(name, torch.float32)
    rank = fields.pop("rank", None)
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
        assert relative_error(change(layer), change(other)) < (1e-6 if "apply_GS" in fields else 1e-11), path


def test_peft_loads_converted_experts(tmp_path: Path) -> None:
    model: Any = built("mixtral", torch.float32, "eager")
    base = made.base_of(model, tmp_path / "base", torch.float32)
    adapter = made.adapter_of(model, tmp_path / "adapter", target_parameters=TARGETS, target_modules=None)
    convert_files([adapter], base, tmp_path / "lora", progress=False)
    adapted = hra_fx.load_adapter(type(model).from_pretrained(base, experts_implementation="eager"), adapter)
    plain = type(model).from_pretrained(base, experts_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    call = call_of("mixtral")
    with torch.no_grad():
        assert relative_error(loaded(**call).logits, adapted(**call).logits) <= 1e-5
