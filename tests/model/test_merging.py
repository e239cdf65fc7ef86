"""`merge_adapter`: the same outputs from plain weights, and back again bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import (
    adapted,
    assert_close,
    bert,
    config,
    ids,
    llama,
    net,
    normal,
    oracle,
    resnet,
    run,
    seen,
    stored,
    weights,
)
from torch import Tensor, nn

import hra_fx

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, list[str], list[str]]] = {
    "net": (net, normal(4, 6), ["first", "second"], ["second", "head"]),
    "resnet": (resnet, normal(2, 3, 32, 32), ["layer1.0.conv1", "fc"], ["layer1.0.conv1", "layer2.0.downsample.0"]),
    "llama": (llama, ids(), ["q_proj", "gate_proj"], ["gate_proj", "down_proj"]),
    "bert": (bert, ids(), ["query", "classifier"], ["value", "query"]),
}


def three(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    plain, model = adapted(
        net(), a=config("first"), b=config("first", "second", r=3), c=config("second", apply_GS=True)
    )
    hra_fx.set_adapter(model, ["a", "b", "c"])
    return plain.to(dtype), model.to(dtype)


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_the_product_and_outputs_stay(name: str) -> None:
    build, x, first, second = MODELS[name]
    plain, model = adapted(build(), a=config(*first), b=config(*second, r=3))
    hra_fx.set_adapter(model, ["b", "a"])
    wanted = oracle(plain, model, ["b", "a"], x)
    hra_fx.merge_adapter(model)
    assert_close(run(model, x), wanted)
    for key, weight in weights(plain, model, ["b", "a"]).items():
        assert_close(stored(model, key), weight)
    hra_fx.unmerge_adapter(model)
    assert_close(run(model, x), wanted)
    assert all(torch.equal(stored(model, key), value) for key, value in plain.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ten_cycles_leave_every_bit(dtype: torch.dtype) -> None:
    plain, model = three(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {key: id(value) for key, value in model.named_parameters()}
    for turn in range(10):
        hra_fx.merge_adapter(model, [["a"], ["a", "b"], None][turn % 3])
        assert not torch.equal(stored(model, "first.weight"), plain.first.weight)
        hra_fx.unmerge_adapter(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert {key: id(value) for key, value in model.named_parameters()} == identities


@pytest.mark.parametrize("merged", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_the_first_ones_merge_and_the_others_go_on_acting(merged: list[str]) -> None:
    plain, model = three()
    x = normal(4, 6)
    wanted = oracle(plain, model, ["a", "b", "c"], x)
    hra_fx.merge_adapter(model, merged)
    assert_close(model(x), wanted)
    assert_close(stored(model, "first.weight"), weights(plain, model, merged)["first.weight"])
    hra_fx.unmerge_adapter(model)
    assert_close(model(x), wanted)


def test_the_others_can_be_trained_beside_merged_ones() -> None:
    plain, model = three()
    hra_fx.merge_adapter(model, "a")
    model(normal(4, 6)).sum().backward()
    assert model.second.hra_u["c"].grad is not None
    assert model.first.hra_u["a"].grad is None
    with torch.no_grad():
        model.second.hra_u["c"].add_(0.3)
    assert_close(model(normal(4, 6)), oracle(plain, model, ["a", "b", "c"], normal(4, 6)))


def test_an_adapter_that_is_not_active_merges_before_the_others() -> None:
    plain, model = three()
    hra_fx.set_adapter(model, ["a"])
    hra_fx.merge_adapter(model, ["c", "b"])
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["c", "b", "a"], x))
    hra_fx.unmerge_adapter(model)
    assert_close(model(x), oracle(plain, model, ["c", "b", "a"], x))


@pytest.mark.parametrize("wrong", [["b"], ["b", "a"], ["c"], ["a", "c"], ["c", "a"]])
def test_a_subset_out_of_order_is_refused(wrong: list[str]) -> None:
    model = three()[1]
    before = seen(model)
    with pytest.raises(hra_fx.AdapterError) as caught:
        hra_fx.merge_adapter(model, wrong)
    assert str(caught.value) == (
        f"adapters {wrong} cannot be folded first: the model computes W Q in the order ['a', 'b', 'c']. Name the first "
        "ones in that order, or call hra_fx.set_adapter with another order."
    )
    assert seen(model) == before


def test_states_that_do_not_allow_it_are_refused() -> None:
    model = three()[1]
    hra_fx.merge_adapter(model, "a")
    with pytest.raises(hra_fx.AdapterError, match=r"^adapters \['a'\] are merged already\. Call unmerge_adapter first"):
        hra_fx.merge_adapter(model, ["a", "b"])
    with pytest.raises(
        hra_fx.AdapterError, match=r"^adapter 'a': it is merged into the weights\. Call unmerge_adapter"
    ):
        hra_fx.set_scale(model, "a", 0.5)
    hra_fx.unmerge_adapter(model)
    hra_fx.set_adapter(model, [])
    with pytest.raises(hra_fx.AdapterError, match=r"^no adapter is active\. Name one, or call hra_fx\.set_adapter"):
        hra_fx.merge_adapter(model)


def test_switching_unmerges_with_a_warning() -> None:
    plain, model = three()
    hra_fx.merge_adapter(model, ["a", "b"])
    text = r"^adapters \['a', 'b'\] were merged; they are unmerged before \['c', 'a'\] are set\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text):
        hra_fx.set_adapter(model, ["c", "a"])
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["c", "a"], x))
    assert torch.equal(stored(model, "first.weight"), plain.first.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.tied(self.free(x)))


def test_tied_weights_are_refused_and_untouched() -> None:
    model = hra_fx.transform(Tied(), config("free", "tied", init_weights=False))
    before = seen(model)
    with pytest.raises(hra_fx.FoldError, match=r"^tied\.weight: it shares memory with other\.weight, .* Untie it"):
        hra_fx.merge_adapter(model)
    assert seen(model) == before


@pytest.mark.parametrize("broken", ["vectors", "weight"])
def test_what_is_not_finite_is_refused_and_nothing_changed(broken: str) -> None:
    model = three()[1]
    with torch.no_grad():
        (model.second.hra_u["b"] if broken == "vectors" else stored(model, "second.weight"))[0, 0] = float("nan")
    before = seen(model)
    with pytest.raises(hra_fx.FoldError, match=r"^second: the folded weight is not finite\. Check the base weight"):
        hra_fx.merge_adapter(model)
    assert seen(model) == before


def test_a_merged_state_does_not_load_into_an_unmerged_model_unnoticed() -> None:
    model, other = three()[1], three()[1]
    hra_fx.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"first\.hra_u\.unmerged\""):
        other.load_state_dict(model.state_dict())
    other = three()[1]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"first\.hra_u\.unmerged\""):
        model.load_state_dict(other.state_dict())


def test_a_merged_state_loads_into_a_merged_model() -> None:
    (plain, model), (_, other) = three(), three()
    with torch.no_grad():
        other.first.hra_u["a"].normal_()
    for each in (model, other):
        hra_fx.merge_adapter(each)
    other.load_state_dict(model.state_dict())
    x = normal(4, 6)
    assert_close(other(x), oracle(plain, model, ["a", "b", "c"], x))
    hra_fx.unmerge_adapter(other)
    assert torch.equal(stored(other, "first.weight"), plain.first.weight)
    assert_close(other(x), oracle(plain, model, ["a", "b", "c"], x))


def test_a_copy_of_a_merged_model_is_merged_by_itself() -> None:
    plain, model = three()
    x = normal(4, 6)
    hra_fx.merge_adapter(model, ["a", "b"])
    wanted, twin = model(x), copy.deepcopy(model)
    hra_fx.unmerge_adapter(model)
    assert torch.equal(twin(x), wanted)
    assert torch.equal(stored(model, "first.weight"), plain.first.weight)
    assert not torch.equal(stored(twin, "first.weight"), plain.first.weight)
    hra_fx.unmerge_adapter(twin)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in twin.state_dict().items())


def test_unmerging_what_is_not_merged_only_warns() -> None:
    model = three()[1]
    before = seen(model)
    with pytest.warns(hra_fx.HRAWarning, match=r"^no adapter is merged; unmerge_adapter does nothing\.$"):
        hra_fx.unmerge_adapter(model)
    assert seen(model) == before


def test_merging_what_is_merged_only_warns() -> None:
    model = three()[1]
    hra_fx.merge_adapter(model, ["a", "b"])
    before = seen(model)
    for names in (["a", "b"], "b"):
        with pytest.warns(
            hra_fx.HRAWarning, match=r"^adapters \['a', 'b'\] are merged already; merge_adapter does nothing\.$"
        ):
            hra_fx.merge_adapter(model, names)
    assert seen(model) == before


def test_a_merged_model_moves_between_dtypes_with_what_it_keeps() -> None:
    plain, model = three()
    hra_fx.merge_adapter(model)
    hra_fx.unmerge_adapter(model.float())
    assert torch.equal(stored(model, "first.weight"), plain.first.weight.float())


def test_a_fold_of_merged_adapters_starts_from_the_weights_before() -> None:
    plain, model = three(torch.bfloat16)
    wanted = weights(plain, model, ["a", "b", "c"])
    hra_fx.merge_adapter(model, ["a"])
    hra_fx.fold(model)
    for key, weight in wanted.items():
        assert torch.equal(stored(model, key), weight.bfloat16())
