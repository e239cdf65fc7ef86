"""Which parameters have `requires_grad` after every step that changes it, and the line that counts them, as in PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft_sides import (
    by_peft,
    net,
    opened_by_peft,
    pair,
    peft_warnings_ignored,
    same_line,
    saved_by_peft,
    tokens,
)
from torch import nn

import hra_fx

Fields = dict[str, Any]
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


#: What PEFT and hra_fx put into the names of the base model's tensors.
ADDED = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module|\.(modules_to_save|hra_saved)\.\w+")


def flags(model: nn.Module) -> set[str]:
    """The names in the base model of all that is trained; names of vectors end in that of their adapter."""
    return {ADDED.sub("", name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapters(model: nn.Module) -> set[str]:
    """Those whose vectors are trained."""
    return {name.rpartition(".hra_u.")[2] for name in flags(model) if ".hra_u." in name}


def same(theirs: nn.Module, ours: nn.Module) -> set[str]:
    """The adapters that are trained; which parameters those are, and how many, is as in PEFT."""
    assert flags(ours) == flags(theirs)
    same_line(theirs, ours)
    return adapters(ours)


def set_both(theirs: Any, ours: Any, name: str, **options: bool) -> set[str]:
    for model in (theirs, ours):
        model.set_adapter(name, **options)
    return same(theirs, ours)


@firsts
def test_one_adapter(first: Fields) -> None:
    assert same(*pair(first | {"inference_mode": True})) == set()
    theirs, ours = pair(first)
    assert same(theirs, ours) == {"default"}
    before = flags(ours)
    with theirs.disable_adapter(), ours.disable_adapter():
        # PEFT clears the flags here; ours stay, and nothing reads the parameters.
        assert flags(theirs) == set()
        assert flags(ours) == before
        assert not ours(tokens()).requires_grad
    assert same(theirs, ours) == {"default"}
    for steps in (("disable_adapter_layers", "enable_adapter_layers"), ("merge_adapter", "unmerge_adapter")):
        for step in steps:
            for model in (theirs.base_model, ours):
                getattr(model, step)()
            assert step == "disable_adapter_layers" or same(theirs, ours) == {"default"}
    # PEFT leaves the base model frozen; here it is as it was before.
    for finish in ("unload", "merge_and_unload"):
        assert all(parameter.requires_grad for parameter in getattr(pair(first)[1], finish)().parameters())


@firsts
@seconds
def test_two_adapters(first: Fields, second: Fields) -> None:
    theirs, ours = pair(first, second)
    assert same(theirs, ours) == {"default"}
    for name in ("other", "default", "default", "other"):
        assert set_both(theirs, ours, name) == {name}
    assert set_both(theirs, ours, "default", inference_mode=True) == set()
    assert set_both(theirs, ours, "other", inference_mode=False) == {"other"}


@seconds
def test_a_list_of_adapters(second: Fields) -> None:
    theirs, ours = pair(FIRST["plain"], second)
    for inference_mode in (False, True):
        for names in (["default", "other"], ["other", "default"], ["other"]):
            for model in (theirs.base_model, ours):
                model.set_adapter(names, inference_mode=inference_mode)
            assert same(theirs, ours) == (set() if inference_mode else set(names))


@firsts
@pytest.mark.parametrize("active", ["default", "other"])
def test_a_deleted_adapter(first: Fields, active: str) -> None:
    """The other one acts with all its parts. PEFT forgets its head, and layers that the deleted one did not have,
    until it is set once more."""
    theirs, ours = pair(first, SECOND["odd, other layers" if active == "default" else "disjoint head"])
    for model in (theirs, ours):
        model.set_adapter(active)
        with peft_warnings_ignored():
            model.delete_adapter("default")
    assert flags(theirs) <= flags(ours)
    theirs.set_adapter("other")
    assert same(theirs, ours) == {"other"}
    assert ours.active_adapters == theirs.active_adapters == ["other"]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapters(is_trainable: bool, tmp_path: Path) -> None:
    """Loading for inference puts the model into eval mode. PEFT also trains a second loaded adapter, which does not
    act."""
    for name, fields in {"first": FIRST["nested head"], "second": SECOND["disjoint head"]}.items():
        saved_by_peft(by_peft(net(), **fields), tmp_path / name)
    theirs = opened_by_peft(net().train(), tmp_path / "first", is_trainable=is_trainable)
    ours = hra_fx.HRAModel.from_pretrained(net().train(), tmp_path / "first", is_trainable=is_trainable)
    assert ours.training is ours.body.layers[0].training is theirs.training is is_trainable
    assert same(theirs, ours) == ({"default"} if is_trainable else set())
    assert set_both(theirs, ours, "default") == {"default"}
    for model in (theirs, ours):
        model.train()
        with peft_warnings_ignored():
            model.load_adapter(tmp_path / "second", "other", is_trainable=is_trainable)
    assert ours.training is theirs.training is is_trainable
    assert adapters(ours) == {"default"}
    assert is_trainable or same(theirs, ours) == {"default"}
    for name in ("other", "default"):
        assert set_both(theirs, ours, name) == {name}
