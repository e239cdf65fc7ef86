"""Adapters of experts, folded on disk: what `fold` in memory saves, and the dense products, for both kinds of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made
from moe_models import NAMES, TARGETS, built, dense_experts, is_transposed
from oracles import relative_error
from safetensors.torch import load_file

import hra_fx

pytestmark = pytest.mark.filterwarnings("ignore:.*untied.*:hra_fx.HRAWarning")

#: Models whose experts have other names in files too.
ALL = (*NAMES, "granitemoe", "jamba", "phimoe", "ernie4_5_moe")
_MARK = ".hra_u"


def adapter_of(model: Any, folder: Path, *targets: str, **fields: Any) -> Path:
    return made.adapter_of(model, folder, *targets, target_parameters=TARGETS, **fields)


def vectors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The parameter of the model -> the vectors of its experts."""
    found = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        owner, _, last = key.removeprefix("base_model.model.").removesuffix(_MARK).rpartition(".")
        if key.endswith(_MARK) and last.startswith("hra_"):
            found[f"{owner}.{last.removeprefix('hra_')}"] = tensor
    return found


@pytest.mark.parametrize("name", ALL)
def test_the_files_are_those_of_a_fold_in_memory(name: str, tmp_path: Path) -> None:
    model: Any = built(name, torch.float32)
    base = made.base_of(model, tmp_path / "base", max_shard_size="6KB")
    adapter = adapter_of(model, tmp_path / "adapter", "o_proj")
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    memory = made.folded_in_memory(type(model).from_pretrained(base, dtype="auto"), tmp_path / "memory", adapter)
    out, wanted = made.tensors(tmp_path / "out"), made.tensors(memory)
    # transformers keeps biases of routers in float32.
    wanted = {key: tensor.to(out[key].dtype) if "bias" in key else tensor for key, tensor in wanted.items()}
    made.equal_but_for_steps(out, wanted)
    assert len(list(base.glob("*.safetensors"))) > 1 and report.verified


@pytest.mark.parametrize("name", ALL)
def test_the_loaded_experts_are_the_dense_products(name: str, tmp_path: Path) -> None:
    model: Any = built(name)
    base = made.base_of(model, tmp_path / "base", torch.float64)
    adapter = adapter_of(model, tmp_path / "adapter")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("fields", [{"apply_GS": True}, {"apply_GS": True, "init_weights": False, "r": 2}], ids=str)
def test_gram_schmidt_and_several_adapters(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model: Any = built(name, torch.float32)
    base = made.base_of(model, tmp_path / "base", torch.float32)
    first = adapter_of(model, tmp_path / "first", **fields)
    second = made.adapter_of(model, tmp_path / "second", target_parameters=TARGETS[1:], target_modules=None, seed=5)
    hra_fx.fold_checkpoint(base, [first, second], tmp_path / "out", verify=True)
    memory = made.folded_in_memory(type(model).from_pretrained(base), tmp_path / "memory", first, second)
    for key, tensor in made.tensors(memory).items():
        torch.testing.assert_close(made.tensors(tmp_path / "out")[key], tensor)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_unfold_restores_the_experts(name: str, tmp_path: Path) -> None:
    model: Any = built(name)
    base = made.base_of(model, tmp_path / "base", torch.float64)
    adapter = adapter_of(model, tmp_path / "adapter")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    hra_fx.unfold_checkpoint(tmp_path / "out", adapter, tmp_path / "back", verify=True)
    for key, tensor in made.tensors(base).items():
        assert relative_error(made.tensors(tmp_path / "back")[key], tensor) < 1e-14, key
