"""`HRAModel(...)` as PEFT's class is called, its methods in the order of both libraries, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model.many import config, moved, normal, seen, sequential, weights
from oracles import relative_error
from peft_sides import F64, net, peft_warnings_ignored, randomise, tokens
from torch import Tensor, nn

import hra_fx

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"], "init_weights": False}
OTHERS: dict[str, Any] = {"r": 4, "target_modules": ["out"], "init_weights": False}


def theirs_of(configs: Any, adapter_name: str = "default") -> Any:
    """PEFT's tuner over a fresh model, called as ours is."""
    with peft_warnings_ignored():
        return peft.tuners.hra.HRAModel(net(F64), configs, adapter_name)


def like(theirs: nn.Module, ours: nn.Module, adapter: str) -> None:
    """Give the vectors of our adapter the values of PEFT's, by path."""
    values = {name.removeprefix("model."): p for name, p in theirs.named_parameters() if ".hra_u." in name}
    vectors = {name: p for name, p in ours.named_parameters() if name.endswith(f".hra_u.{adapter}")}
    assert vectors.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in vectors.items():
            parameter.copy_(values[name])


CALLS: dict[str, Callable[[nn.Module, hra_fx.HRAConfig], Any]] = {
    "by place": lambda model, settings: hra_fx.HRAModel(model, settings, "mine"),
    "peft_config": lambda model, settings: hra_fx.HRAModel(model, peft_config=settings, adapter_name="mine"),
    "config": lambda model, settings: hra_fx.HRAModel(model, config=settings, adapter_name="mine"),
    "a dict": lambda model, settings: hra_fx.HRAModel(model, {"mine": settings}, "mine"),
    "peft_config, a dict": lambda model, settings: hra_fx.HRAModel(
        model=model, peft_config={"mine": settings}, adapter_name="mine", low_cpu_mem_usage=False
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_way_to_call_it_computes_what_peft_computes(call: Callable[..., Any]) -> None:
    theirs, base = theirs_of(peft.HRAConfig(**FIELDS), "mine"), net(F64)
    ours = call(base, hra_fx.HRAConfig(**FIELDS))
    assert ours is ours.get_base_model() is base
    assert list(ours.peft_config) == ["mine"]
    like(theirs, ours, "mine")
    assert relative_error(ours(tokens()), theirs(tokens())) < 1e-12


def test_a_dict_of_configurations_makes_several_adapters_of_which_the_named_one_acts() -> None:
    settings = {"a": hra_fx.HRAConfig(**FIELDS), "b": hra_fx.HRAConfig(**OTHERS)}
    for first, second in (("a", "b"), ("b", "a")):
        given = dict(settings)
        ours = hra_fx.HRAModel(net(F64), given, first)
        assert given.keys() == settings.keys()
        assert ours.active_adapters == [first]
        assert set(ours.peft_config) == {first, second}
        assert (ours.peft_config["a"].r, ours.peft_config["b"].r) == (2, 4)
        for name in (first, second):
            theirs = theirs_of(peft.HRAConfig(**(FIELDS if name == "a" else OTHERS)), name)
            ours.set_adapter(name)
            like(theirs, ours, name)
            assert relative_error(ours(tokens()), theirs(tokens())) < 1e-12
    # With another name than those of the dict, the first one acts.
    assert hra_fx.HRAModel(net(F64), settings).active_adapters == ["a"]


GOOD = hra_fx.HRAConfig(**FIELDS)
BROKEN = [
    *(({}, "HRAConfig"), (None, "HRAConfig"), ("all-linear", "HRAConfig"), ({"a": "all-linear"}, "HRAConfig")),
    ({"a": GOOD, "b": hra_fx.HRAConfig(r=2, target_modules=["absent"])}, "absent"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_a_broken_configuration_leaves_the_model_as_it_was(broken: Any, message: str) -> None:
    base = net(F64)
    before = seen(base)
    with pytest.raises(hra_fx.HRAError, match=message):
        hra_fx.HRAModel(base, broken, "a")
    assert seen(base) == before


class Demanding(nn.Module):
    """Subclasses of it have to say something."""

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.first(x)


@pytest.mark.parametrize("way", ["new", "from a file"])
def test_a_class_without_subclasses_is_refused_and_the_model_is_as_it_was(way: str, tmp_path: Path) -> None:
    base = Demanding().double()
    settings = config("first", init_weights=False)
    before, wanted = seen(base), base(normal(3, 6))
    message = r"^Demanding cannot be subclassed \(TypeError: .*'key'.*\)\."
    if way == "from a file":
        source = nn.Sequential()
        source.add_module("first", nn.Linear(6, 6))
        hra_fx.save_adapter(hra_fx.transform(source, settings), tmp_path)
    with pytest.raises(hra_fx.AdapterError, match=message):
        if way == "new":
            hra_fx.HRAModel(base, settings)
        else:
            hra_fx.HRAModel.from_pretrained(base, tmp_path)
    assert seen(base) == before
    assert torch.equal(base(normal(3, 6)), wanted)
    assert type(base) is Demanding
    assert all(parameter.requires_grad for parameter in base.parameters())


class DemandingLinear(nn.Linear):
    """A layer whose subclasses have to say something."""

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


@pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
def test_a_layer_whose_class_has_no_subclasses_is_refused_by_its_path(way: Callable[..., Any]) -> None:
    base = nn.Sequential(nn.Linear(6, 6), DemandingLinear(6, 4)).double()
    before = seen(base)
    with pytest.raises(hra_fx.HRAError, match="DemandingLinear"):
        way(base, config("1", init_weights=False))
    assert seen(base) == before


ADD: dict[str, Callable[[Any, hra_fx.HRAConfig], None]] = {
    "PEFT": lambda model, settings: model.add_adapter("b", settings),
    "PEFT, by name": lambda model, settings: model.add_adapter(adapter_name="b", peft_config=settings),
    "transformers": lambda model, settings: model.add_adapter(settings, "b"),
    "transformers, by name": lambda model, settings: model.add_adapter(settings, adapter_name="b"),
}


@pytest.mark.parametrize("order", ADD)
def test_add_adapter_takes_the_order_of_peft_and_that_of_transformers(order: str) -> None:
    model = hra_fx.HRAModel(sequential(), config("0", init_weights=False), "a")
    before, base = model(normal(3, 6)), sequential()
    ADD[order](model, config("3", init_weights=False))
    assert list(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["a"]
    assert torch.equal(model(normal(3, 6)), before)
    model.set_adapter("b")
    rotated = weights(base, model, ["b"])
    wanted = nn.functional.linear(torch.relu(base[0](normal(3, 6))), rotated["3.weight"], base[3].bias)
    assert relative_error(model(normal(3, 6)), wanted) < 1e-12
    model.add_adapter(config("3"))
    assert list(model.peft_config) == ["a", "b", "default"]


def test_add_adapter_refuses_what_is_neither_and_changes_nothing() -> None:
    model = hra_fx.HRAModel(sequential(), config("0"), "a")
    before = seen(model)
    with pytest.raises(hra_fx.HRAError, match="HRAConfig"):
        model.add_adapter("b", "all-linear")
    with pytest.raises(hra_fx.HRAError, match="'a'"):
        model.add_adapter(config("3"), "a")
    assert seen(model) == before


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["classifier"]}, {"bias": "hra_only"}, {"bias": "all"}], ids=str
)
def test_a_strength_warns_of_what_it_does_not_turn(fields: dict[str, Any]) -> None:
    model: Any = net(F64)
    hra_fx.HRAModel(model, hra_fx.HRAConfig(**FIELDS, **fields))
    randomise(model)
    copies = {
        name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and "hra_u" not in name
    }
    assert copies != {}
    message = "adapter 'default': the strength only affects reflections, not trained modules and biases."
    with pytest.warns(hra_fx.HRAWarning, match=f"^{re.escape(message)}$") as caught:
        hra_fx.set_scale(model, "default", 0.0)
    assert len(caught) == 1
    # The base model with the trained copies is what acts at the strength 0.
    plain = net(F64)
    with torch.no_grad():
        for name, tensor in copies.items():
            plain.get_parameter(name).copy_(tensor)
    assert relative_error(model(tokens()), plain(tokens())) < 1e-12
    assert relative_error(model(tokens()), net(F64)(tokens())) > 1e-3
    # Full strength is what it was trained for, and warns of nothing.
    hra_fx.set_scale(model, "default", 1.0)
    assert moved(model(tokens()), plain(tokens()))
