"""Names of adapters: which are possible, taken, unknown or given twice; each refusal leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from model.many import adapted, config, net, refuses
from torch import nn

import hra_fx

#: Names that are no part of a path or not a folder, and names that modules of ours use.
BAD = ["", " ", " a", "a ", "a.b", "a/b", "a\\b", "a\0b", "keys", "update", "forward", "width", "unmerged", "x_anchor"]
BAD += ["_anchor", "y_scaled", "base_layer", "original_module", "copied", "specs", "active", "remove"]


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_name_is_refused(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]), b=config("first"), c=config("second"))[1]
    text = (
        "`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, no "
        f"spaces at its ends, not ending in '_anchor' or '_scaled', and not a reserved name; got {name!r}."
    )
    with refuses(model, f"^{re.escape(text)}$"):
        hra_fx.add_adapter(model, name, config("first"))


def test_transform_and_combine_refuse_an_impossible_name() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("first"))
    for given, act in (
        (model, lambda: hra_fx.combine(model, ["a", "b"], "a.b")),
        (plain, lambda: hra_fx.transform(plain, config("first"), "a.b")),
    ):
        with refuses(given, "^`adapter_name` must be a string that can name"):
            act()


@pytest.mark.parametrize("name", ["training", "add"])
def test_a_name_that_every_module_uses_is_refused(name: str) -> None:
    plain, model = adapted(net(), a=config("first"))
    for given, act in (
        (model, lambda: hra_fx.add_adapter(model, name, config("first", "second"))),
        (plain, lambda: hra_fx.transform(plain, config("first"), name)),
    ):
        with refuses(given, rf"^adapter '{name}' already exists\. Choose another name\.$"):
            act()


def test_a_name_that_is_not_a_string_is_refused() -> None:
    model = adapted(net(), a=config("first"))[1]
    with refuses(model, r"^`adapter_name` must be a string such as 'default', got 3\.$"):
        hra_fx.add_adapter(model, 3, config("first"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["style-2", "été", "class", "a b", "0", "default", "hra_u", "_x", "weight", "bias"])
def test_a_possible_name_names_parameters_and_copies(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    hra_fx.add_adapter(model, name, config("first", modules_to_save=["head"]))
    hra_fx.set_adapter(model, name)
    assert f"first.hra_u.{name}" in model.state_dict()
    hra_fx.set_adapter(model, "a")
    assert f"head.hra_saved.{name}.weight" in model.state_dict()
    hra_fx.delete_adapter(model, name)
    assert not any(f"hra_u.{name}" in key or f"hra_saved.{name}." in key for key in model.state_dict())


def test_a_taken_name_is_refused() -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    for act in (
        lambda: hra_fx.add_adapter(model, "b", config("second")),
        lambda: hra_fx.combine(model, ["a", "b"], "b"),
    ):
        text = r"^adapter 'b' already exists in this model\. Delete it first, or choose another name\.$"
        with refuses(model, text):
            act()


USES: list[Callable[[nn.Module, Any], Any]] = [hra_fx.set_adapter, hra_fx.merge_adapter, hra_fx.fold]


@pytest.mark.parametrize("use", USES)
def test_unknown_and_repeated_names_are_refused(use: Callable[[nn.Module, Any], Any]) -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    with refuses(model, r"^the model has no adapter 'ab'\. It has 'a', 'b'\.$"):
        use(model, "ab")
    with refuses(model, r"^adapter names must be unique, got \['a', 'b', 'a'\]\.$"):
        use(model, ["a", "b", "a"])
