"""`merge_adapter`, `fold` of some adapters, and `disable_adapters`: plain weights, and back again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import (
    SAVED,
    adapted,
    assert_close,
    config,
    moved,
    net,
    normal,
    oracle,
    refuses,
    seen,
    three,
    weights,
)
from torch import nn

import hra_fx
from hra_fx.model.state import get_state


@pytest.mark.parametrize("act", [hra_fx.merge_adapter, hra_fx.fold])
@pytest.mark.parametrize(
    ("active", "merged"),
    [
        ("abc", "a"),
        ("abc", ["a"]),
        ("abc", ["a", "b"]),
        ("abc", ["a", "b", "c"]),
        ("a", ["c", "b"]),  # inactive adapters act before the active ones
    ],
)
def test_the_first_ones_are_merged_or_folded_and_the_others_still_act(
    act: Callable[..., Any], active: str, merged: str | list[str]
) -> None:
    plain, model = three()
    hra_fx.set_adapter(model, list(active))
    x = normal(4, 6)
    wanted, new = oracle(plain, model, dict.fromkeys([*merged, *active]), x), weights(plain, model, merged)
    act(model, merged)
    assert_close(model(x), wanted)
    for key, weight in new.items():
        assert_close(model.get_parameter(key), weight)
    if act is hra_fx.merge_adapter:
        hra_fx.unmerge_adapter(model)
        assert_close(model(x), wanted)


def test_the_others_can_be_trained_while_some_are_merged() -> None:
    plain, model = three()
    hra_fx.merge_adapter(model, iter(["a"]))
    model(normal(4, 6)).sum().backward()
    assert model.second.hra_u["c"].grad is not None
    assert model.first.hra_u["a"].grad is None
    with torch.no_grad():
        model.second.hra_u["c"].add_(0.3)
    assert_close(model(normal(4, 6)), oracle(plain, model, ["a", "b", "c"], normal(4, 6)))


@pytest.mark.parametrize("act", [hra_fx.merge_adapter, hra_fx.fold])
@pytest.mark.parametrize("wrong", [["b", "a"], ["a", "c"]])
def test_a_subset_out_of_order_is_refused(wrong: list[str], act: Callable[..., Any]) -> None:
    model = three()[1]
    text = (
        f"adapters {wrong} cannot be folded first: the model computes W Q in the order ['a', 'b', 'c']. Fold the first "
        "ones of that order, or set another order with hra_fx.set_adapter."
    )
    with refuses(model, f"^{re.escape(text)}$"):
        act(model, wrong)


def test_states_that_do_not_allow_a_merge_are_refused() -> None:
    model = three()[1]
    hra_fx.merge_adapter(model, "a")
    with refuses(model, r"^adapters \['a'\] are already merged\. Call unmerge_adapter first"):
        hra_fx.merge_adapter(model, ["a", "b"])
    with refuses(model, r"^adapter 'a' is merged into the weights\. Call unmerge_adapter"):
        hra_fx.set_scale(model, "a", 0.5)
    hra_fx.unmerge_adapter(model)
    hra_fx.set_adapter(model, [])
    with refuses(model, r"^no adapter is active\. Name one, or call hra_fx\.set_adapter"):
        hra_fx.merge_adapter(model)


def test_switching_unmerges_with_a_warning() -> None:
    plain, model = three()
    hra_fx.merge_adapter(model, ["a", "b"])
    text = r"^adapters \['a', 'b'\] were merged; they are unmerged before \['c', 'a'\] are set\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text):
        hra_fx.set_adapter(model, ["c", "a"])
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["c", "a"], x))
    assert torch.equal(model.get_parameter("first.weight"), plain.first.weight)


def test_a_repeated_merge_or_unmerge_only_warns() -> None:
    model = three()[1]
    before = seen(model)
    with pytest.warns(hra_fx.HRAWarning, match=r"^no adapter is merged; unmerge_adapter does nothing\.$"):
        hra_fx.unmerge_adapter(model)
    assert seen(model) == before
    hra_fx.merge_adapter(model, ["a", "b"])
    before = seen(model)
    for names in (["a", "b"], "b"):
        with pytest.warns(
            hra_fx.HRAWarning, match=r"^adapters \['a', 'b'\] are already merged; merge_adapter does nothing\.$"
        ):
            hra_fx.merge_adapter(model, names)
    assert seen(model) == before


def test_a_fold_of_merged_adapters_starts_from_the_weights_before() -> None:
    plain, model = three(torch.bfloat16)
    wanted = weights(plain, model, ["a", "b", "c"])
    hra_fx.merge_adapter(model, ["a"])
    hra_fx.fold(model)
    for key, weight in wanted.items():
        assert torch.equal(model.get_parameter(key), weight.bfloat16())


# ---- `fold(model, names)`: some adapters go into the weights, and the others stay as they were ----


def test_a_fold_without_names_warns_of_adapters_that_are_not_active() -> None:
    plain, model = three()
    hra_fx.set_adapter(model, "b")
    x = normal(4, 6)
    wanted = oracle(plain, model, ["b"], x)
    text = r"^adapters \['a', 'c'\] were not active and are removed\. To keep them, pass the names to fold\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text) as caught:
        hra_fx.fold(model)
    assert caught[0].filename == __file__
    assert_close(model(x), wanted)
    assert type(model) is type(plain)


@pytest.mark.parametrize("active", ["a", "b"])
def test_copies_become_the_models_own_and_the_others_keep_theirs(active: str) -> None:
    """Also while another adapter's copies are in place."""
    saved = {"modules_to_save": ["head", "norm"]}
    plain, model = adapted(net(), a=config("first", **saved), b=config("first", **saved), c=config("second"))
    heads = {}
    for name in ("a", "b"):
        hra_fx.set_adapter(model, name)
        heads[name] = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    x = normal(4, 6)
    hra_fx.set_adapter(model, active)
    hra_fx.fold(model, "a")
    assert torch.equal(model.head.weight, heads[active][0])
    for name, owner in (("b", "b"), ("c", "a"), ([], "a")):
        hra_fx.set_adapter(model, name)
        assert torch.equal(model.head.weight, heads[owner][0])
    assert not model.head.weight.requires_grad
    with hra_fx.disable_adapters(model):
        assert torch.equal(model.head.bias, heads["a"][1])
        assert not torch.equal(model(x), plain(x))
    hra_fx.delete_adapter(model, "b")
    assert not any("hra_saved" in key for key in model.state_dict())
    assert torch.equal(model.head.weight, heads["a"][0])


# ---- `disable_adapters`: the base model bit for bit inside the block, and everything as it was after it ----


def four() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", "second", **SAVED), b=config("first", r=3), c=config("second"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("merged", [[], ["b"], ["b", "a"]])
def test_the_base_model_acts_inside_nested_blocks_and_an_exception_restores_everything(
    merged: list[str], dtype: torch.dtype
) -> None:
    plain, model = four()
    plain.to(dtype), model.to(dtype)
    hra_fx.set_adapter(model, ["b", "a"])
    hra_fx.set_scale(model, "c", 0.5)
    if merged:
        hra_fx.merge_adapter(model, merged)
    x, state = normal(4, 6).to(dtype), repr(get_state(model))
    before, wanted = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    assert moved(wanted, plain(x))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hra_fx.disable_adapters(model):
            assert torch.equal(model(x), plain(x))
            with hra_fx.disable_adapters(model):
                assert torch.equal(model(x), plain(x))
            assert torch.equal(model(x), plain(x))
            _ = 1 / 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert torch.equal(model(x), wanted)
    assert repr(get_state(model)) == state


def test_the_buffers_of_a_saved_norm_are_not_updated_inside() -> None:
    plain, model = four()
    plain.train(), model.train()
    waiting = model.norm.running_mean
    kept, x = waiting.clone(), normal(4, 6)
    with hra_fx.disable_adapters(model):
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert model.norm.running_mean is waiting
    assert torch.equal(waiting, kept)


@pytest.mark.parametrize("saved", [{}, {"modules_to_save": ["head"]}], ids=["vectors", "copies"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_is_set_inside_is_active_afterwards(merged: bool, saved: dict[str, list[str]]) -> None:
    plain, model = adapted(net(), a=config("first", "second", **saved), b=config("second", **saved), c=config("first"))
    x = normal(4, 6)
    hra_fx.set_adapter(model, "b")
    head = {f"head.{key}": getattr(model.head, key).detach() for key in ("weight", "bias")}
    wanted = oracle(plain, model, ["b"], x, **head)
    hra_fx.set_adapter(model, "a")
    if merged:
        hra_fx.merge_adapter(model)
    with hra_fx.disable_adapters(model):
        hra_fx.set_adapter(model, "b")
        hra_fx.delete_adapter(model, "c")
        assert torch.equal(model(x), plain(x))
    record = get_state(model)
    assert (record.active, record.merged, record.disabled) == (("b",), (), False)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained == ["second.hra_u.b", *head] if saved else ["second.hra_u.b"]
    assert_close(model(x), wanted)
    for name in ("first.weight", "second.weight"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))


def test_merging_and_folding_inside_and_a_plain_model_are_refused() -> None:
    model = four()[1]
    text = r"^adapters are disabled\. Leave the disable_adapters block, or call set_adapter or enable_adapter_layers"
    with hra_fx.disable_adapters(model):
        for act in (hra_fx.merge_adapter, hra_fx.fold):
            with refuses(model, text):
                act(model)
    with pytest.raises(hra_fx.AdapterError, match=r"^Net has no adapters\. Call hra_fx\.transform"):
        hra_fx.disable_adapters(net())


# Without `with`


def test_a_plain_call_disables_until_set_adapter_and_a_block_after_it_changes_nothing() -> None:
    plain, model = four()
    x, wanted = normal(4, 6), model(normal(4, 6))
    hra_fx.disable_adapters(model)
    assert torch.equal(model(x), plain(x))
    with hra_fx.disable_adapters(model):
        pass
    assert torch.equal(model(x), plain(x))
    hra_fx.set_adapter(model, "a")
    assert torch.equal(model(x), wanted)


def test_methods_keep_them_disabled_until_they_are_enabled_as_in_peft() -> None:
    plain, model = four()
    model = hra_fx.HRAModel(model, config("first", "second", **SAVED), "a")
    x, wanted = normal(4, 6), model(normal(4, 6))
    model.disable_adapter_layers()
    model.set_adapter("a")
    assert torch.equal(model(x), plain(x))
    with model.disable_adapter():
        pass
    assert torch.equal(model(x), plain(x))
    model.enable_adapter_layers()
    assert torch.equal(model(x), wanted)
