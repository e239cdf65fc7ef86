"""Folding adapters of experts on disk, compared with dense products and `fold` in memory, for both layouts of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made
from checkpoint.disk.made import refused
from moe_models import TARGETS, built, dense_experts, is_transposed
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

import hra_fx
from hra_fx.lora.from_files import read_as_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*untied.*:hra_fx.HRAWarning")

#: Models whose experts have the same names in files, or other names. Other models have the names of Qwen3.
ALL = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe", "jamba", "phimoe", "ernie4_5_moe")
_MARK = ".hra_u"


def adapter_of(model: Any, folder: Path, *targets: str, **fields: Any) -> Path:
    return made.adapter_of(model, folder, *targets, target_parameters=TARGETS, **fields)


def vectors_of(folder: Path) -> dict[str, Tensor]:
    """Name of a parameter in the model -> the vectors of its experts."""
    found = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        owner, _, last = key.removeprefix("base_model.model.").removesuffix(_MARK).rpartition(".")
        if key.endswith(_MARK) and last.startswith("hra_"):
            found[f"{owner}.{last.removeprefix('hra_')}"] = tensor
    return found


@pytest.mark.parametrize("name", ALL)
def test_loaded_experts_equal_the_dense_products(name: str, tmp_path: Path) -> None:
    model: Any = built(name)
    base = made.base_of(model, tmp_path / "base", torch.float64, max_shard_size="12KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = adapter_of(model, tmp_path / "adapter")
    assert hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True).verified
    before, after = (
        type(model).from_pretrained(folder, dtype="auto").state_dict() for folder in (base, tmp_path / "out")
    )
    vectors = vectors_of(adapter)
    assert vectors
    for key, tensor in after.items():
        if key in vectors:
            wanted = dense_experts(before[key], vectors[key].double(), is_transposed(model, key))
            assert relative_error(tensor, wanted) < 1e-13 < relative_error(tensor, before[key]), key
        else:
            assert torch.equal(tensor, before[key]), key


def _converter(sources: list[str], target: str, *operations: Any) -> Any:
    return WeightConverter(source_patterns=sources, target_patterns=target, operations=list(operations))


NAMES = ("gate_up_proj", "down_proj")
#: Converters for the experts of Qwen3-MoE, and the tensors in a checkpoint for its two parameters.
CONVERSIONS: dict[str, tuple[list[Any], Callable[[Tensor, Tensor], dict[str, Tensor]]]] = {
    "transposes by shape": (
        [_converter([f"experts.{name}"], f"experts.{name}", Transpose(1, 2, check_dims=True)) for name in NAMES],
        # The second one is square, so it is not transposed.
        lambda gate_up, down: {"gate_up_proj": gate_up.mT, "down_proj": down},
    ),
    "joins": (
        [_converter(["experts.gate_proj", "experts.up_proj"], "experts.gate_up_proj", Concatenate(dim=1))],
        lambda gate_up, down: {
            "gate_proj": gate_up.chunk(2, dim=1)[0],
            "up_proj": gate_up.chunk(2, dim=1)[1],
            "down_proj": down,
        },
    ),
}


def convert_by(monkeypatch: pytest.MonkeyPatch, *converters: Any) -> None:
    """Let transformers load Qwen3-MoE with the conversions of other models."""
    conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")  # fills the cache
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "qwen3_moe", list(converters))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converters, split = CONVERSIONS[name]
    convert_by(monkeypatch, *converters)
    model: Any = built("qwen3_moe")
    made.base_of(model, tmp_path / "base", torch.float64)
    stored = {key: tensor for key, tensor in model.state_dict().items() if "experts" not in key}
    for i, layer in enumerate(model.model.layers):
        experts = split(layer.mlp.experts.gate_up_proj.detach(), layer.mlp.experts.down_proj.detach())
        stored |= {f"model.layers.{i}.mlp.experts.{key}": tensor.contiguous() for key, tensor in experts.items()}
    save_file(stored, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = adapter_of(model, tmp_path / "adapter")
    hra_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    loaded = type(model).from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    state = model.state_dict()
    for key, own in vectors_of(adapter).items():
        assert relative_error(loaded[key], dense_experts(state[key], own.double(), transposed=False)) < 1e-13, key


def test_parameters_of_an_unknown_model(tmp_path: Path) -> None:
    model: Any = built("gpt_oss")
    base = made.base_of(model, tmp_path / "base", torch.float64)
    adapter = adapter_of(model, tmp_path / "adapter")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "known")
    (base / "config.json").unlink()
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    known = made.tensors(tmp_path / "known")
    assert all(torch.equal(tensor, known[key]) for key, tensor in made.tensors(tmp_path / "out").items())
    with pytest.raises(hra_fx.CheckpointError, match="so PEFT's names for the LoRA of its experts are unknown"):
        read_as_lora([adapter], base, progress=False)


def test_square_experts_of_an_unknown_model(tmp_path: Path) -> None:
    model: Any = built("qwen3_moe")
    made.adapter_of(model, tmp_path / "adapter", target_parameters=TARGETS[1:], target_modules=None)
    (tmp_path / "base").mkdir()
    save_file(
        {key: tensor for key, tensor in model.state_dict().items() if "experts" in key},
        tmp_path / "base" / "model.safetensors",
    )
    assert "down_proj is square, (4, 16, 16), and the folder has no config.json" in refused(tmp_path)
    hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "rows", columns=[])
    hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "columns", columns=["experts.down_proj"])
    key, own = next(iter(vectors_of(tmp_path / "adapter").items()))
    for name in ("rows", "columns"):
        wanted = dense_experts(model.state_dict()[key], own.double(), name == "columns")
        assert relative_error(made.tensors(tmp_path / name)[key], wanted) < 1e-13


BASE, FILE = "base/model.safetensors", "adapter/adapter_model.safetensors"
LAYER = "model.layers.1.mlp.experts"
#: The folder that is changed, how its tensors are changed, and the message.
REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "missing expert": (
        "base",
        lambda state: state.pop(f"{LAYER}.2.up_proj.weight"),
        f"{BASE}: {LAYER}.gate_up_proj consists of 4 tensors of each kind, but the checkpoint has 4 for mlp.experts.*.",
    ),
    "fewer experts": (
        "adapter",
        lambda state: state.update({key: own[:3].clone() for key, own in state.items()}),
        f"{BASE}: model.layers.0.mlp.experts.down_proj has 4 experts (model.layers.0.mlp.experts.0.down_proj.weight",
    ),
    "no vectors of a parameter": (
        "adapter",
        lambda state: state.pop(f"base_model.model.{LAYER}.hra_down_proj.hra_u"),
        f"{FILE}: the file has no vectors for {LAYER}.down_proj, which the configuration names. Was the adapter",
    ),
    "vectors of one expert": (
        "adapter",
        lambda state: state.update({key: own[0].clone() for key, own in state.items()}),
        f"{FILE}: base_model.model.model.layers.0.mlp.experts.hra_down_proj.hra_u must have shape (experts, d, 4), got",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    name, change, message = REFUSED[case]
    model: Any = built("qwen3_moe", torch.float32)
    made.base_of(model, tmp_path / "base", torch.float32)
    adapter_of(model, tmp_path / "adapter")
    (file,) = (tmp_path / name).glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    assert refused(tmp_path).startswith(message)


def test_a_conversion_that_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = built("qwen3_moe", torch.float32)
    made.base_of(model, tmp_path / "base", torch.float32)
    adapter_of(model, tmp_path / "adapter")
    steps = (MergeModulelist(0), Transpose(0, 1))
    convert_by(monkeypatch, _converter(["experts.*.down_proj.weight"], "experts.down_proj", *steps))
    message = refused(tmp_path)
    assert message.startswith(f"{BASE}: transformers creates model.layers.0.mlp.experts.down_proj from tensors such as")
    assert "by MergeModulelist, Transpose, and it is unknown which of their dimensions are the inputs" in message


def test_a_trained_router_that_has_another_name_in_files(tmp_path: Path) -> None:
    model: Any = built("mixtral", torch.float32)
    base = made.base_of(model, tmp_path / "base", torch.float32)
    adapter = adapter_of(model, tmp_path / "adapter", modules_to_save=["mlp.gate"])
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    memory = made.folded_in_memory(type(model).from_pretrained(base), tmp_path / "memory", adapter)
    out = made.tensors(tmp_path / "out")
    made.equal_but_for_steps(out, made.tensors(memory))
    routers = [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)]
    assert set(routers) <= set(report.given)
    assert not any(torch.equal(out[key], made.tensors(base)[key]) for key in routers)
