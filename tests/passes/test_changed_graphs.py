"""Graphs that users change after the adapters are inserted, and the models that they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import randomise
from graph_modules import IMAGES, Cnn, Mlp, X, adapted, config, traced
from layers.checking import assert_same
from torch import Tensor, fx, nn

import hra_fx
from hra_fx import passes
from hra_fx.errors import AdapterError, GraphInvariantError, HRAError
from hra_fx.model.state import adapted_layers


def halve_input_of(model: fx.GraphModule, path: str) -> None:
    """What a pass that quantizes inputs does: an operator before each call of a layer."""
    for call in model.graph.find_nodes(op="call_module", target=path):
        with model.graph.inserting_before(call):
            half = model.graph.call_function(torch.mul, (call.args[0], 0.5))
        call.args = (half, *call.args[1:])
    model.recompile()


@pytest.mark.parametrize(("make", "path", "example"), [(Mlp, "second", X), (Cnn, "grouped", IMAGES)])
def test_an_operator_before_a_layer_takes_effect(make: Any, path: str, example: Tensor) -> None:
    base, model = (part.eval() for part in adapted(make, path))
    base.load_state_dict(hra_fx.fold(copy.deepcopy(model)).state_dict())
    halve_input_of(base, path)
    halve_input_of(model, path)
    assert_same(model(example), base(example))


@pytest.mark.parametrize(
    "change",
    [
        hra_fx.fold,
        lambda model: hra_fx.delete_adapter(model, "default"),
        hra_fx.merge_adapter,
        lambda model: hra_fx.add_adapter(model, "more", config()),
    ],
    ids=["fold", "delete", "merge", "add"],
)
def test_reflections_with_an_operator_behind_them_are_not_removed(change: Callable[[Any], Any]) -> None:
    _, model = adapted()
    halve_input_of(model, "second")
    wanted, code, keys = model(X), model.code, list(model.state_dict())
    with pytest.raises(GraphInvariantError, match="second: node 'mul' is between the layer and the reflection"):
        change(model)
    assert model.code == code and list(model.state_dict()) == keys
    assert_same(model(X), wanted)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.second.weight) + self.first.weight.sum()


@pytest.mark.parametrize("example", [None, X], ids=["traced", "captured"])
def test_the_model_of_a_graph_reads_the_adapted_weights(example: Tensor | None) -> None:
    model = Reads().double()
    graph = hra_fx.transform(model, config(), trace=True, example_inputs=example)
    randomise(graph)
    assert_same(model(X), graph(X))
    assert_same(model(X), hra_fx.fold(copy.deepcopy(graph))(X))


@pytest.mark.parametrize(
    "end", [hra_fx.fold, lambda model: hra_fx.delete_adapter(model, "default"), hra_fx.merge_adapter]
)
def test_a_compiled_model_runs_after_its_adapters_end(end: Callable[[Any], Any]) -> None:
    model = hra_fx.transform(Mlp().double(), config())
    compiled: Any = torch.compile(model, backend="eager")
    compiled(X)
    end(model)
    assert_same(compiled(X), copy.deepcopy(model)(X))


def test_insert_names_a_layer_without_adapter() -> None:
    model = traced()
    with pytest.raises(GraphInvariantError, match="first: it has no adapter"):
        passes.insert(model, passes.match(model, config()))


@pytest.mark.needs("torch>=2.9")
def test_a_pattern_for_all_names_matches_the_layers_of_a_captured_graph_alone() -> None:
    class Captured(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] > 1 else x

    model = hra_fx.transform(Captured().double(), config(target_modules=".*"), trace=True, example_inputs=X)
    assert set(adapted_layers(model)) == {"first", "second"}


def test_symbolic_trace_is_refused_and_leaves_the_graph_as_it_was() -> None:
    _, model = adapted()
    wanted = model(X)
    with pytest.raises(AdapterError, match="trace"):
        torch.fx.symbolic_trace(model)
    assert_same(model(X), wanted)


class Draws(nn.Module):
    """Noise from a generator of its own, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.generator = nn.Linear(6, 6), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x if x.shape[0] > 99 else x + torch.rand(6, generator=self.generator, dtype=x.dtype))


class Clashes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.hra_factors = nn.Linear(6, 6), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.hra_factors(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.needs("torch>=2.9")
@pytest.mark.parametrize("make", [Draws, Clashes])
def test_what_a_graph_cannot_have_is_refused_by_name(make: Any) -> None:
    model = make().double()
    with pytest.raises(HRAError, match=r"Generator|hra_factors"):
        hra_fx.transform(model, config("first"), trace=True, example_inputs=X)
    assert type(model) is make and list(model.state_dict()) == ["first.weight", "first.bias"]
