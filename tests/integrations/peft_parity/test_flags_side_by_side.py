"""Which parameters have `requires_grad` after every step that changes it: PEFT's rules, with PEFT beside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
from integrations.peft_parity.sides import (
    by_peft,
    by_us,
    net,
    opened_by_peft,
    peft_warnings_ignored,
    saved_by_peft,
    tokens,
)
from torch import nn

import hra_fx

Fields = dict[str, Any]
Flag = tuple[str, str]
FIRST: dict[str, Fields] = {
    "plain": {"r": 2, "target_modules": ["query", "value"]},
    "head": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    "nested head": {"r": 2, "target_modules": ["query"], "modules_to_save": ["head", "embed"]},
}
SECOND: dict[str, Fields] = {
    "same": {"r": 4, "target_modules": ["query", "value"]},
    "odd, other layers": {"r": 3, "target_modules": ["conv", "out"]},
    "disjoint head": {"r": 2, "target_modules": ["query"], "modules_to_save": ["norm"]},
}
firsts = pytest.mark.parametrize("first", FIRST.values(), ids=FIRST.keys())
seconds = pytest.mark.parametrize("second", SECOND.values(), ids=SECOND.keys())


def theirs_trained(model: nn.Module) -> set[Flag]:
    """(tensor of the base model, adapter), for what PEFT trains; "base" where it is no adapter's own."""
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if ".hra_u." in name:
                found.add((f"{name.partition('.hra_u.')[0]}.hra_u", name.partition(".hra_u.")[2]))
            elif ".modules_to_save." in name:
                owner, _, rest = name.partition(".modules_to_save.")
                adapter, _, tensor = rest.partition(".")
                found.add((f"{owner}.{tensor}", adapter))
            else:
                found.add((name.replace(".original_module", ""), "base"))
    return found


def ours_trained(model: nn.Module) -> set[Flag]:
    found = set()
    for path, owner in model.named_modules():
        saved = getattr(owner, "hra_saved", None)
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if ".hra_u" in path:
                found.add((path, name))
            elif ".hra_saved." in path:
                found.add((f"{path.partition('.hra_saved.')[0]}.{name}", path.partition(".hra_saved.")[2]))
            else:
                whose = saved.in_place.get(name, "base") if saved is not None else "base"
                found.add((f"{path}.{name}", "base" if whose == "base_layer" else whose))
    return found


def pair(first: Fields, second: Fields | None = None) -> tuple[Any, Any]:
    theirs, ours = by_peft(net(), **first), by_us(net(), **first)
    if second:
        with peft_warnings_ignored():
            theirs.add_adapter("other", peft.HRAConfig(**copy.deepcopy(second)))
        ours.add_adapter("other", hra_fx.HRAConfig(**second))
    return theirs, ours


def same(theirs: nn.Module, ours: nn.Module) -> set[Flag]:
    got = ours_trained(ours)
    assert got == theirs_trained(theirs)
    return got


@firsts
def test_after_transform(first: Fields) -> None:
    assert {adapter for _, adapter in same(*pair(first))} == {"default"}
    assert same(*pair(first | {"inference_mode": True})) == set()


@firsts
@seconds
def test_after_add_adapter_and_set_adapter(first: Fields, second: Fields) -> None:
    theirs, ours = pair(first, second)
    assert {adapter for _, adapter in same(theirs, ours)} == {"default"}
    for name in ("other", "default", "default", "other"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert {adapter for _, adapter in same(theirs, ours)} == {name}
    for model in (theirs, ours):
        model.set_adapter("default", inference_mode=True)
    assert same(theirs, ours) == set()
    for model in (theirs, ours):
        model.set_adapter("other", inference_mode=False)
    assert {adapter for _, adapter in same(theirs, ours)} == {"other"}


@seconds
def test_after_setting_a_list(second: Fields) -> None:
    theirs, ours = pair(FIRST["plain"], second)
    for names in (["default", "other"], ["other", "default"], ["other"]):
        theirs.base_model.set_adapter(names)
        ours.set_adapter(names)
        flags = same(theirs, ours)
        assert {adapter for _, adapter in flags} == set(names)
    theirs.base_model.set_adapter(["default", "other"], inference_mode=True)
    ours.set_adapter(["default", "other"], inference_mode=True)
    assert same(theirs, ours) == set()


@firsts
@seconds
@pytest.mark.parametrize(("active", "gone"), [("default", "default"), ("other", "default")])
def test_after_delete_adapter(first: Fields, second: Fields, active: str, gone: str) -> None:
    """What is left acts, all of it. PEFT forgets the head of it, and layers that the deleted one did not have, until
    it is set once more."""
    theirs, ours = pair(first, second)
    for model in (theirs, ours):
        model.set_adapter(active)
        with peft_warnings_ignored():
            model.delete_adapter(gone)
    left = "other" if gone == "default" else "default"
    assert theirs_trained(theirs) <= ours_trained(ours)
    theirs.set_adapter(left)
    assert {adapter for _, adapter in same(theirs, ours)} == {left}
    assert ours.active_adapters == theirs.active_adapters == [left]


@firsts
def test_after_the_disable_block(first: Fields) -> None:
    theirs, ours = pair(first)
    with theirs.disable_adapter(), ours.disable_adapter():
        pass
    assert {adapter for _, adapter in same(theirs, ours)} == {"default"}


@firsts
def test_inside_the_disable_block_no_gradient_comes_to_an_adapter(first: Fields) -> None:
    """PEFT clears the flags there as well; here they stay, and nothing reads what they belong to."""
    theirs, ours = pair(first)
    before = ours_trained(ours)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert theirs_trained(theirs) == set()
        assert ours_trained(ours) == before
        assert not ours(tokens()).requires_grad


@firsts
def test_after_layers_were_switched_off_and_on(first: Fields) -> None:
    theirs, ours = pair(first)
    for model in (theirs.base_model, ours):
        model.disable_adapter_layers()
        model.enable_adapter_layers()
    assert {adapter for _, adapter in same(theirs, ours)} == {"default"}


@firsts
def test_after_merge_and_unmerge(first: Fields) -> None:
    theirs, ours = pair(first)
    before = same(theirs, ours)
    for step in ("merge_adapter", "unmerge_adapter"):
        for model in (theirs, ours):
            getattr(model, step)()
        assert same(theirs, ours) == before


@firsts
@pytest.mark.parametrize("finish", ["unload", "merge_and_unload"])
def test_after_the_adapters_are_gone_flags_are_those_of_the_base_model(first: Fields, finish: str) -> None:
    """PEFT leaves the base model frozen; here it is what it was before."""
    _, ours = pair(first)
    model = getattr(ours, finish)()
    assert all(parameter.requires_grad for parameter in model.parameters())


@firsts
@pytest.mark.parametrize("is_trainable", [False, True])
def test_after_loading(first: Fields, is_trainable: bool, tmp_path: Path) -> None:
    saved_by_peft(by_peft(net(), **first), tmp_path)
    theirs = opened_by_peft(net(), tmp_path, is_trainable=is_trainable)
    ours = hra_fx.HRAModel.from_pretrained(net(), tmp_path, is_trainable=is_trainable)
    assert {adapter for _, adapter in same(theirs, ours)} == ({"default"} if is_trainable else set())
    for model in (theirs, ours):
        model.set_adapter("default")
    assert {adapter for _, adapter in same(theirs, ours)} == {"default"}


@firsts
@seconds
def test_after_loading_a_second_one_for_inference(first: Fields, second: Fields, tmp_path: Path) -> None:
    saved_by_peft(by_peft(net(), **second), tmp_path)
    theirs, ours = pair(first)
    with peft_warnings_ignored():
        theirs.load_adapter(tmp_path, "other")
    ours.load_adapter(tmp_path, "other")
    assert {adapter for _, adapter in same(theirs, ours)} == {"default"}
    for name in ("other", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert {adapter for _, adapter in same(theirs, ours)} == {name}


def test_a_second_one_that_is_to_be_trained_gets_its_gradients_when_it_acts(tmp_path: Path) -> None:
    """PEFT gives gradients to the waiting adapter too, where no forward could reach them."""
    saved_by_peft(by_peft(net(), **SECOND["same"]), tmp_path)
    theirs, ours = pair(FIRST["plain"])
    with peft_warnings_ignored():
        theirs.load_adapter(tmp_path, "other", is_trainable=True)
    ours.load_adapter(tmp_path, "other", is_trainable=True)
    assert {adapter for _, adapter in ours_trained(ours)} == {"default"}
    for model in (theirs, ours):
        model.set_adapter("other")
    assert {adapter for _, adapter in same(theirs, ours)} == {"other"}


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_for_inference_puts_the_model_into_eval_mode(is_trainable: bool, tmp_path: Path) -> None:
    """So that dropout is off without a word more, as after transformers' own `from_pretrained`."""
    saved_by_peft(by_peft(net(), **FIRST["plain"]), tmp_path)
    theirs = opened_by_peft(net().train(), tmp_path, is_trainable=is_trainable)
    ours = hra_fx.HRAModel.from_pretrained(net().train(), tmp_path, is_trainable=is_trainable)
    assert ours.training is theirs.training is is_trainable
    assert ours.body.layers[0].training is is_trainable


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_a_second_one_for_inference_puts_the_model_into_eval_mode(is_trainable: bool, tmp_path: Path) -> None:
    saved_by_peft(by_peft(net(), **SECOND["same"]), tmp_path)
    theirs, ours = pair(FIRST["plain"])
    for model in (theirs, ours):
        model.train()
        with peft_warnings_ignored():
            model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
    assert ours.training is theirs.training is is_trainable
