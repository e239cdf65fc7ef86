"""Graphs of torch.fx are right in train and in eval mode. What it refuses is in `test_refused`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import picture, randomise
from graph_modules import COPIES
from layers.checking import assert_same, check, normal
from torch import Tensor, fx, nn
from tracing.models import TRACED, Dropout, Norms

import hra_fx

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


def test_a_trace_does_not_change_the_model() -> None:
    for make in TRACED:
        model = make().double()
        model.train(make is not Norms)
        adapted = hra_fx.transform(model, config_of(model))
        before = picture(adapted), torch.get_rng_state().tolist()
        assert list(hra_fx.graphs(adapted)) == [""]
        assert (picture(adapted), torch.get_rng_state().tolist()) == before
