"""Run-time facts: a model captured whole is edited, and the edit counts; where nothing changed, the graph runs."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import adapt, assert_close, assert_equals_oracle, assert_whole, inputs, oracle, seed, spied, turn
from capture.models import Block, Convolutions, Stack, Two
from oracles import dense_product, dense_weight
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import regions_of

X = inputs(4, 6)
IMAGES = inputs(2, 3, 6, 6)


def whole(model: nn.Module | None = None, *args: Tensor) -> tuple[nn.Module, nn.Module]:
    """A model captured whole, whose graphs have run in both modes before the test edits it."""
    adapted, base = adapt(Stack() if model is None else model)
    assert_whole(adapted)
    spy = spied(adapted, *(args or (X,)))
    assert_equals_oracle(adapted, base, *(args or (X,)))
    assert spy.runs == 3, "what is tested is the graph"
    return adapted, base


def test_the_graph_runs_as_long_as_the_facts_hold() -> None:
    adapted, base = whole()
    spy = spied(adapted, X)
    for rows in (1, 5, 9):
        assert_equals_oracle(adapted, base, inputs(rows, 6))
    with torch.no_grad():
        adapted(X)
    assert spy.runs == 10


def test_a_new_weight_or_a_new_state_is_no_reason_to_leave_the_graph() -> None:
    adapted, base = whole()
    spy = spied(adapted, X)
    for model in (adapted, base):
        model.head.weight = nn.Parameter(inputs(5, 8, value=3), requires_grad=False)
        model.scale.shift = torch.full((8,), -1.0, dtype=torch.float64)
        with torch.no_grad():
            model.stem.bias.fill_(0.5)
    turn(adapted, value=11)
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 3


Edit = Callable[[nn.Module], Any]


def replace_block(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.blocks[0] = Block().double().requires_grad_(False)


def append_block(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.blocks.append(Block().double().requires_grad_(False))


def rebind_method(model: nn.Module) -> None:
    model.forward_features = types.MethodType(lambda self, x: self.scale(self.stem(x)) * 5, model)


EDITS: dict[str, Edit] = {
    "replace a child": lambda model: setattr(model, "scale", nn.Tanh()),
    "append a child": append_block,
    "delete a child": lambda model: model.blocks.__delitem__(1),
    "child becomes Identity": lambda model: setattr(model.blocks[0], "norm", nn.Identity()),
    "add a child to a dissolved one": lambda model: model.scale.add_module("extra", nn.Linear(2, 2)),
    "dropout rate": lambda model: setattr(model.blocks[0], "rate", 0.9),
    "dropout rate in all blocks": lambda model: [setattr(block, "rate", 0.0) for block in model.blocks],
    "a number": lambda model: setattr(model.scale, "rate", -3.0),
    "a function": lambda model: setattr(model.scale, "function", torch.sin),
    "a function of Python": lambda model: setattr(model.scale, "function", lambda x: x.cos()),
    "a function partly applied": lambda model: setattr(
        model.scale, "function", partial(F.leaky_relu, negative_slope=0.7)
    ),
    "delete a bias": lambda model: setattr(model.stem, "bias", None),
    "delete the bias of a leaf": lambda model: setattr(model.blocks[0].norm, "bias", None),
    "instance forward of a child": lambda model: setattr(model.scale, "forward", lambda x: x * 7),
    "instance forward of a site": lambda model: setattr(model.head, "forward", lambda x: x.sum(1, keepdim=True)),
    "instance forward of a leaf": lambda model: setattr(model.blocks[0].norm, "forward", lambda x: x * 7),
    "instance method of the model": lambda model: setattr(model, "forward_head", lambda x: x * 7),
    "rebound method of the model": rebind_method,
    "instance attribute over a method of a block": lambda model: setattr(model.blocks[1], "forward", lambda x: x),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_counts(name: str) -> None:
    adapted, base = whole()
    EDITS[name](adapted), EDITS[name](base)
    adapted.requires_grad_(False), base.requires_grad_(False)
    for key, parameter in adapted.named_parameters():
        parameter.requires_grad_(".hra_u." in key)
    if name == "instance forward of a site":  # takes the layer's own place: nothing of it is adapted any more
        expected = oracle(adapted, base)
        assert_close(adapted.eval()(X).detach(), expected.eval()(X).detach())
        return
    if name == "rebound method of the model":
        expected = oracle(adapted, base)
        expected.forward_features = types.MethodType(lambda self, x: self.scale(self.stem(x)) * 5, expected)
        assert_close(adapted(X).detach(), expected(X).detach())
        return
    _assert_equal_outputs(adapted, base)


def _assert_equal_outputs(adapted: nn.Module, base: nn.Module) -> None:
    """As `assert_equals_oracle`, for models that lost some of their sites in the edit."""
    sites = [path for path, part in adapted.named_modules() if hasattr(part, "hra_u")]
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for path in sites:
            layer = plain.get_submodule(path)
            layer.weight.copy_(dense_weight(layer.weight, dense_product(adapted.get_submodule(path).hra_u["default"])))
    for mode in (True, False):
        seed()
        found = adapted.train(mode)(X)
        seed()
        assert_close(found.detach(), plain.train(mode)(X).detach())


class Settings:
    """A configuration object of the kind that models keep at hand."""

    def __init__(self) -> None:
        self.gain = 2.0


class Configured(Two):
    """Reads settings of many kinds while it runs."""

    gain = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.names = types.SimpleNamespace(gain=3.0)
        self.table = {"a": {"b": [1.0, 2.0]}}
        self.functions = [torch.tanh]
        self.named = {"act": torch.tanh}
        self.kind = torch.float64
        self.partly = partial(F.leaky_relu, negative_slope=0.1)
        self.register_buffer("extra", None)
        self.inner = Inner()

    def shifted(self, hidden: Tensor) -> Tensor:
        return hidden + 1

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.first(x)) * self.settings.gain * self.names.gain * self.table["a"]["b"][1] * self.gain
        hidden = self.partly(self.named["act"](self.functions[0](hidden))).to(self.kind).to(torch.float64)
        if self.extra is not None:
            hidden = hidden * self.extra
        return self.second(self.shifted(hidden))


class Inner(nn.Module):
    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("extra", None)
        self.settings = Settings()

    def shifted(self, hidden: Tensor) -> Tensor:
        return hidden + self.power

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(x if self.extra is None else x * self.extra) * self.settings.gain


SETTINGS: dict[str, Edit] = {
    "object": lambda model: setattr(model.settings, "gain", 5.0),
    "object of a child": lambda model: setattr(model.inner.settings, "gain", 5.0),
    "another object": lambda model: setattr(model, "settings", types.SimpleNamespace(gain=7.0)),
    "namespace": lambda model: setattr(model.names, "gain", 5.0),
    "nested table": lambda model: model.table["a"]["b"].__setitem__(1, 9.0),
    "list of functions": lambda model: model.functions.__setitem__(0, torch.sin),
    "dict of functions": lambda model: model.named.__setitem__("act", torch.sin),
    "dtype": lambda model: setattr(model, "kind", torch.float16),
    "partial": lambda model: setattr(model, "partly", partial(F.leaky_relu, negative_slope=0.9)),
    "buffer that was None": lambda model: setattr(model, "extra", torch.full((8,), 3.0, dtype=torch.float64)),
    "buffer of a child that was None": lambda model: setattr(
        model.inner, "extra", torch.full((8,), 3.0, dtype=torch.float64)
    ),
    "class attribute, on the model": lambda model: setattr(model, "gain", 9.0),
    "class attribute, on a child": lambda model: setattr(model.inner, "power", 9.0),
    "method, on the model": lambda model: setattr(model, "shifted", lambda hidden: hidden * 9),
    "method, on a child": lambda model: setattr(model.inner, "shifted", lambda hidden: hidden * 9),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_edit_of_settings_counts(name: str) -> None:
    adapted, base = adapt(Configured())
    assert_equals_oracle(adapted, base, X)
    SETTINGS[name](adapted), SETTINGS[name](base)
    assert_equals_oracle(adapted, base, X)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_edit_of_settings_of_a_copy_before_its_first_call_counts(name: str) -> None:
    adapted, base = adapt(Configured())
    adapted = copy.deepcopy(adapted)
    SETTINGS[name](adapted), SETTINGS[name](base)
    assert_equals_oracle(adapted, base, X)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (Configured, "gain", 9.0),
        (Inner, "power", 9.0),
        (Configured, "shifted", lambda self, hidden: hidden * 9),
        (Inner, "shifted", lambda self, hidden: hidden * 9),
        (Inner, "forward", lambda self, x: x * 9),
    ],
)
def test_an_edit_of_a_class_counts(owner: type, name: str, value: Any) -> None:
    """As patches of attention implementations do."""
    adapted, base = adapt(Configured())
    assert_equals_oracle(adapted, base, X)
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        assert_equals_oracle(adapted, base, X)
    finally:
        setattr(owner, name, before)
    assert_equals_oracle(adapted, base, X)


MODES: dict[str, Edit] = {
    "block in eval": lambda model: model.blocks[0].eval(),
    "all blocks in eval": lambda model: model.blocks.eval(),
    "only the list in eval": lambda model: setattr(model.blocks, "training", False),
    "site in eval": lambda model: model.head.eval(),
    "scale in eval": lambda model: model.scale.eval(),
    "leaf in eval": lambda model: model.blocks[1].norm.eval(),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_parts_in_another_mode(name: str, training: bool) -> None:
    adapted, base = whole()
    for model in (adapted, base):
        model.train(training)
        MODES[name](model)
        if not training:
            model.blocks[0].train()
    assert_equals_oracle(adapted, base, X, modes=(None, None))
    for model in (adapted, base):
        model.train(training)
    spy = spied(adapted, X)
    assert_equals_oracle(adapted, base, X, modes=(None,))
    assert spy.runs == 1, "back in one mode, the graph runs again"


def test_frozen_batch_norm() -> None:
    adapted, base = whole(Convolutions(), IMAGES)
    for model in (adapted, base):
        model.train()
        model.norm.eval()
    assert_equals_oracle(adapted, base, IMAGES, modes=(None, None))


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda part: part.register_forward_hook(lambda module, args, output: output * 2),
    "forward that unpacks": lambda part: part.register_forward_hook(unpack),
    "forward with kwargs": lambda part: part.register_forward_hook(
        lambda module, args, kwargs, output: output * 2 + len(args) + len(kwargs), with_kwargs=True
    ),
    "pre": lambda part: part.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "pre of one value": lambda part: part.register_forward_pre_hook(lambda module, args: args[0] * 2),
    "pre of all values": lambda part: part.register_forward_pre_hook(lambda module, args: tuple(a * 2 for a in args)),
    "pre with kwargs": lambda part: part.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    ),
    "backward": lambda part: part.register_full_backward_hook(lambda module, before, after: (before[0] * 2,)),
    "backward pre": lambda part: part.register_full_backward_pre_hook(lambda module, after: (after[0] * 2,)),
}


def unpack(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (x,) = args
    return output + x.sum()


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", ["", "scale", "stem", "head", "blocks.0", "blocks.1.norm", "blocks.0.down"])
def test_hooks_that_come_later_run(kind: str, path: str) -> None:
    adapted, base = whole()
    x = X.clone().requires_grad_()
    handles = [HOOKS[kind](model.get_submodule(path)) for model in (adapted, base)]
    assert_equals_oracle(adapted, base, x)
    for handle in handles:
        handle.remove()
    spy = spied(adapted, x)
    assert_equals_oracle(adapted, base, x)
    assert spy.runs == 3, "without hooks, the graph runs again"


@pytest.mark.parametrize("kind", ["forward", "pre", "pre of all values", "forward that unpacks"])
@pytest.mark.parametrize("path", ["conv1", "conv2", "norm", "fc"])
def test_hooks_that_come_later_run_in_convolutions(kind: str, path: str) -> None:
    adapted, base = whole(Convolutions(), IMAGES)
    for model in (adapted, base):
        HOOKS[kind](model.get_submodule(path))
    assert_equals_oracle(adapted, base, IMAGES)


@pytest.mark.parametrize("path", ["scale", "stem", "blocks.0", "blocks.0.up", "blocks.1.norm"])
def test_hooks_see_the_tensors_that_they_see_in_the_base_model(path: str) -> None:
    adapted, base = whole()
    plain = oracle(adapted, base)
    seen: list[list[Any]] = []
    for model in (adapted.eval(), plain.eval()):
        record: list[Any] = []
        part = model.get_submodule(path)
        part.register_forward_pre_hook(lambda module, args, record=record: record.append(args))
        part.register_forward_hook(lambda module, args, output, record=record: record.append((args, output)))
        model(X)
        seen.append(record)
    assert len(seen[0]) == 2
    assert_close(*([[value.detach() for value in _flat(record)] for record in seen]))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _flat(item)


def test_global_hooks_see_every_module() -> None:
    adapted, base = whole()
    seen: list[list[str]] = []
    for model in (adapted, base):
        record: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, record=record: record.append(type(module).__name__)
        )
        try:
            model(X)
        finally:
            handle.remove()
        seen.append([name for name in record if not name.endswith("Reflection")])
    assert seen[0] == seen[1]


def test_a_second_transform_and_a_refused_one_keep_the_graph() -> None:
    adapted, base = whole()
    config = next(iter(vars(adapted)["_hra_record"].configs.values()))
    assert hra_fx.transform(adapted, config) is adapted
    with pytest.raises(hra_fx.AdapterError):
        hra_fx.transform(adapted, hra_fx.HRAConfig(r=5, target_modules=["head"]))
    spy = spied(adapted, X)
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 3 and len(regions_of(adapted)) == 1
