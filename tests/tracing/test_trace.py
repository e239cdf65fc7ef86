"""Tracing with torch.fx: right in train and eval mode, or refused with a reason; the model is not changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapting import randomise
from graph_modules import COPIES
from layers.checking import assert_same, check, normal
from torch import Tensor, fx, nn
from tracing.models import TRACED, Dropout, Norms, Two

import hra_fx
from hra_fx.errors import AdapterError

X = normal(7, 4, 6)


def config_of(model: nn.Module) -> hra_fx.HRAConfig:
    layers = [path for path, part in model.named_modules() if isinstance(part, (nn.Linear, nn.MultiheadAttention))]
    return hra_fx.HRAConfig(r=2, target_modules=layers)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    """A model in float64, and its adapted GraphModule with random vectors."""
    torch.manual_seed(0)
    base = make().double()
    model = hra_fx.transform(copy.deepcopy(base), config_of(base), trace=True)
    randomise(model)
    return base, model


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if "hra_u" not in name}


# ---- traced ----


@pytest.mark.parametrize("make", TRACED)
def test_outputs_gradients_and_buffers_are_those_of_the_model(make: type[nn.Module]) -> None:
    base, model = pair(make)
    assert isinstance(model, fx.GraphModule)
    for mine in (model, *(copied(model) for copied in COPIES[:2])):
        own = copy.deepcopy(base)
        for x in (X, normal(8, 7, 6)):
            check(own, mine, x)
            assert buffers(mine).keys() == buffers(own).keys()
            for name, value in buffers(mine).items():
                torch.testing.assert_close(value, buffers(own)[name], rtol=1e-10, atol=1e-10)


def test_a_batch_norm_frozen_in_eval_mode_stays_frozen() -> None:
    base = Norms().double()
    for early in (True, False):
        frozen = copy.deepcopy(base)
        if early:
            frozen.own.eval(), frozen.norm.eval()
        config = hra_fx.HRAConfig(r=2, target_modules=["first", "second"])
        model = hra_fx.transform(copy.deepcopy(frozen), config, trace=True)
        if not early:
            for each in (frozen, model):
                each.own.eval(), each.norm.eval()
        assert model.training
        assert_same(model(X), frozen(X))
        assert int(model.own.num_batches_tracked) == int(model.norm.num_batches_tracked) == 0


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_a_part_in_another_mode_stays_in_it() -> None:
    model = Nested().double()
    model.block.eval()
    config = hra_fx.HRAConfig(r=2, target_modules=["block.first"])
    graph = hra_fx.transform(copy.deepcopy(model), config, trace=True)
    assert_same(graph(X), model(X))
    graph.block.train()
    assert not torch.equal(graph(X), graph(X))


# ---- refused ----


def middle(change: Callable[[Two, Tensor], Any]) -> type[Two]:
    """A model that does something between its two layers."""
    return type("Changed", (Two,), {"middle": change})


def under(context: Callable[[], Any]) -> type[Two]:
    """A model that runs its first layer under a context."""

    def forward(self: Two, x: Tensor) -> Any:
        with context():
            hidden = self.first(x)
        return self.second(hidden)

    return type("Under", (Two,), {"forward": forward})


def counted(self: Any, hidden: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return hidden


class ModeChanged(Two):
    """Changes the mode of a part in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def middle(self, hidden: Tensor) -> Any:
        self.drop.training = True
        return self.drop(hidden)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Two()
        self.block.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class NoArguments(Two):
    def forward(self, *x: Tensor) -> Tensor:
        return self.second(self.first(x[0]))


class Modes(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) if self.training else torch.relu(self.second(self.first(x)))


class Outputs(Two):
    def forward(self, x: Tensor) -> Any:
        out = self.second(self.first(x))
        return out if self.training else (out, x)


BRANCH, GRAD = "it branches on a value", "it changes grad mode or autocast, or calls a custom autograd function"
RANDOM, OTHER = "it draws random numbers in Python", "it runs different operations in train mode"
DIFFERS = "its output differs for"
REFUSED: dict[str, tuple[type[nn.Module], str]] = {
    "autocast": (under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), GRAD),
    "no_grad": (under(torch.no_grad), GRAD),
    "Python random": (middle(lambda self, hidden: hidden * random.random()), RANDOM),
    "seed": (middle(lambda self, hidden: (torch.manual_seed(3), hidden)[1]), RANDOM),
    "isinstance": (middle(lambda self, hidden: hidden * 2 if isinstance(hidden, Tensor) else hidden), DIFFERS),
    "if": (middle(lambda self, hidden: hidden * 2 if hidden.sum() > 0 else hidden), BRANCH),
    "int": (middle(lambda self, hidden: hidden * int(hidden.shape[0])), "not 'Proxy'"),
    "constant tensor": (middle(lambda self, hidden: hidden * torch.tensor(2.0)), "it creates a tensor in Python"),
    "attribute": (middle(counted), "its forward changes calls"),
    "mode of a part": (ModeChanged, "its forward changes drop.training"),
    "hooks": (Hooked, "block: it has hooks"),
    "no arguments": (NoArguments, "its forward does not have a required argument"),
    "modes": (Modes, OTHER),
    "outputs": (Outputs, OTHER),
}


def state_of(model: nn.Module) -> list[Any]:
    modules = [(path, type(m), [(k, id(v), repr(v)) for k, v in vars(m).items()]) for path, m in model.named_modules()]
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return [modules, generators, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_without_a_change(name: str) -> None:
    make, reason = REFUSED[name]
    model = make().double()
    before = state_of(model)
    with pytest.raises(AdapterError) as caught:
        hra_fx.transform(model, config_of(model), trace=True)
    assert reason in str(caught.value)
    assert state_of(model) == before


def test_a_trace_changes_nothing_either() -> None:
    for make in TRACED:
        model = make().double()
        model.train(make is not Norms)
        adapted = hra_fx.transform(model, config_of(model))
        before = state_of(adapted)
        assert list(hra_fx.graphs(adapted)) == [""]
        assert state_of(adapted) == before
