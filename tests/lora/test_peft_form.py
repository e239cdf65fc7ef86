"""The factors of `convert_to_lora` against the dense change `W Q - W` in float64, and the configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
import torch
from functional.test_householder import quick, seeds
from hypothesis import given, strategies as st
from lora.kinds import KINDS, adapted, dense_change, exported_change, move
from oracles import relative_error
from torch import nn

import hra_fx
from hra_fx import HRAConfig


@quick
@given(st.sampled_from(list(KINDS)), st.integers(1, 5), st.booleans(), st.booleans(), seeds)
def test_the_factors_are_the_change_of_the_weight(kind: str, r: int, apply_GS: bool, init: bool, seed: int) -> None:
    model = adapted(kind, HRAConfig(r=r, apply_GS=apply_GS, init_weights=init, target_modules=["0"]), seed=seed)
    config, tensors = hra_fx.convert_to_lora(model)
    wanted = dense_change(model[0], ["a"])
    assert relative_error(exported_change(tensors, "0"), wanted) < 1e-6
    assert config["r"] == config["lora_alpha"] == int(torch.linalg.matrix_rank(wanted, rtol=1e-7))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # They are balanced, so that half precision rounds both alike.
    A, B = (torch.linalg.svdvals(tensors[f"base_model.model.0.lora_{name}.weight"].flatten(1)) for name in "AB")
    assert relative_error(A, B) < 1e-5


@quick
@given(st.sampled_from(list(KINDS)), st.booleans(), st.floats(0.05, 1), st.floats(0.05, 1), seeds)
def test_several_adapters_act_in_their_order_and_at_their_strengths(
    kind: str, apply_GS: bool, first: float, second: float, seed: int
) -> None:
    one = HRAConfig(r=2, apply_GS=apply_GS, target_modules=["0"])
    model = adapted(kind, one, HRAConfig(r=3, target_modules=["0"]), seed=seed)
    hra_fx.set_scale(model, "a", first)
    hra_fx.set_scale(model, "b", second)
    for names in (["a", "b"], ["b", "a"], ["b"]):
        _, tensors = hra_fx.convert_to_lora(model, names)
        assert relative_error(exported_change(tensors, "0"), dense_change(model[0], names)) < 1e-6
    hra_fx.set_adapter(model, ["b", "a"])
    _, tensors = hra_fx.convert_to_lora(model)
    assert relative_error(exported_change(tensors, "0"), dense_change(model[0], ["b", "a"])) < 1e-6


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_of_the_model_changes(merged: bool) -> None:
    """The change of a merged adapter is that of the base weight from before the merge."""
    model = adapted("Linear", HRAConfig(r=4, target_modules=["0"]))
    wanted = dense_change(model[0], ["a"])
    if merged:
        hra_fx.merge_adapter(model)
    before = {name: (value.clone(), value._version) for name, value in model.state_dict().items()}
    _, tensors = hra_fx.convert_to_lora(model)
    assert relative_error(exported_change(tensors, "0"), wanted) < 1e-6
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(value) and after[name]._version == v for name, (value, v) in before.items())


@pytest.mark.parametrize("r", [3, 8])
@pytest.mark.parametrize("apply_GS", [False, True])
def test_a_fresh_adapter_is_a_zero_of_rank_one_with_a_warning(r: int, apply_GS: bool) -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(12, 9)), HRAConfig(r=r, apply_GS=apply_GS, target_modules=["0"]))
    with pytest.warns(hra_fx.HRAWarning, match=r"^the adapters do not change any weight \(untrained, or at scale 0\)"):
        config, tensors = hra_fx.convert_to_lora(model)
    assert config["r"] == 1
    assert [(tuple(t.shape), int(t.count_nonzero())) for t in tensors.values()] == [((1, 12), 0), ((9, 1), 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_adapter_of_a_narrow_model_keeps_its_change(dtype: torch.dtype) -> None:
    """Its anchor is rounded to the dtype, and the change may be of the size of that rounding."""
    torch.manual_seed(0)
    model: Any = hra_fx.transform(nn.Sequential(nn.Linear(64, 48)), HRAConfig(r=8, apply_GS=True, target_modules=["0"]))
    move(model, 1, size=0.05)
    model.to(dtype)
    wanted = dense_change(model[0], ["default"])
    _, tensors = hra_fx.convert_to_lora(model)
    assert wanted.norm() < 0.2 * model[0].hra_base.norm()
    assert relative_error(exported_change(tensors, "0"), wanted) < 1e-6


def two_layers() -> nn.Module:
    """Adapters of rank 2 on "first" and of rank 5 on "second"."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(12, 9), "second": nn.Linear(9, 7), "third": nn.Linear(7, 7)})
    hra_fx.transform(model, HRAConfig(r=2, target_modules=["first"]), "a")
    move(model, 1)
    hra_fx.add_adapter(model, "b", HRAConfig(r=4, target_modules=["second"]))
    hra_fx.set_adapter(model, "b")
    move(model, 2)
    hra_fx.set_adapter(model, ["a", "b"])
    return model


@pytest.mark.parametrize("rank_pattern", [False, True])
def test_all_layers_have_one_rank_padded_with_zeros_or_their_own(rank_pattern: bool) -> None:
    model = two_layers()
    config, tensors = hra_fx.convert_to_lora(model, rank_pattern=rank_pattern)
    own = {"first": 2} if rank_pattern else {}
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, own, own)
    A, B = (tensors[f"base_model.model.first.lora_{name}.weight"] for name in "AB")
    rank = own.get("first", 4)
    assert (A.shape, B.shape) == ((rank, 12), (9, rank))
    assert A[2:].count_nonzero() == 0
    assert relative_error(exported_change(tensors, "first"), dense_change(model["first"], ["a"])) < 1e-6


def test_the_configuration_is_one_of_peft() -> None:
    model = adapted("Linear", HRAConfig(r=4, target_modules=["0"], task_type="CAUSAL_LM"))
    config, _ = hra_fx.convert_to_lora(model)
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert config.keys() <= fields
    made: Any = peft.LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    assert (made.r, made.lora_alpha, made.task_type, made.inference_mode) == (4, 4, "CAUSAL_LM", True)
