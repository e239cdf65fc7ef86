"""Names of adapters: which are possible, taken, unknown or given twice; each refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from model.many import adapted, config, net, seen
from torch import nn

import hra_fx

BAD = [
    "",
    " ",
    " a",
    "a ",
    "a.b",
    "a/b",
    "a\\b",
    "a\0b",
    "keys",
    "update",
    "forward",
    "unmerged",
    "x_anchor",
    "y_scaled",
]
BAD += ["base_layer", "original_module", "copied", "specs", "active", "remove"]


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_name_is_refused_with_its_rule(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    before = seen(model)
    text = "it names parameters inside the model, and a folder on disk, so it must be a string without dots, slashes"
    for act in (
        lambda: hra_fx.add_adapter(model, name, config("first")),
        lambda: hra_fx.combine(adapted(net(), a=config("first"), b=config("first"))[1], ["a", "b"], name),
        lambda: hra_fx.transform(net(), config("first"), name),
    ):
        with pytest.raises(hra_fx.AdapterError) as caught:
            act()
        assert str(caught.value).startswith(f"adapter name {name!r}: {text}")
        assert str(caught.value).endswith("Choose another name.")
    assert seen(model) == before


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


def test_a_name_that_every_module_uses_is_refused() -> None:
    model = adapted(net(), a=config("first"))[1]
    before = seen(model)
    with pytest.raises(hra_fx.AdapterError, match=r"^adapter name 'training': .* Choose another name\.$"):
        hra_fx.add_adapter(model, "training", config("first", "second"))
    assert seen(model) == before


def test_no_string_is_refused() -> None:
    model = adapted(net(), a=config("first"))[1]
    with pytest.raises(hra_fx.AdapterError, match=r"^adapter_name must be a string such as 'default', got 3\.$"):
        hra_fx.add_adapter(model, 3, config("first"))  # type: ignore[arg-type]


def test_a_taken_name_is_refused() -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    text = r"^adapter 'b' exists already in this model\. Delete it first, or choose another name\.$"
    before = seen(model)
    for act in (
        lambda: hra_fx.add_adapter(model, "b", config("first")),
        lambda: hra_fx.add_adapter(model, "b", config("second")),
        lambda: hra_fx.combine(model, ["a", "b"], "b"),
    ):
        with pytest.raises(hra_fx.AdapterError, match=text):
            act()
    assert seen(model) == before


USES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "set_adapter": lambda model, name: hra_fx.set_adapter(model, name),
    "delete_adapter": lambda model, name: hra_fx.delete_adapter(model, name),
    "merge_adapter": lambda model, name: hra_fx.merge_adapter(model, name),
    "set_scale": lambda model, name: hra_fx.set_scale(model, name, 0.5),
    "fold": lambda model, name: hra_fx.fold(model, name),
    "combine": lambda model, name: hra_fx.combine(model, ["a", name], "c"),
    "save_adapter": lambda model, name: hra_fx.save_adapter(model, "unused", name),
}


@pytest.mark.parametrize("use", USES)
def test_an_unknown_name_is_refused_and_those_there_are_listed(use: str) -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    before = seen(model)
    with pytest.raises(hra_fx.AdapterError, match=r"^adapter 'ab': the model has no such adapter\. It has 'a', 'b'\.$"):
        USES[use](model, "ab")
    assert seen(model) == before


@pytest.mark.parametrize("use", ["set_adapter", "merge_adapter", "fold"])
def test_a_name_given_twice_is_refused(use: str) -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    before = seen(model)
    text = r"^adapters \['a', 'b', 'a'\]: one is named twice\. Name each once, in the order of the product\.$"
    with pytest.raises(hra_fx.AdapterError, match=text):
        USES[use](model, ["a", "b", "a"])
    assert seen(model) == before
