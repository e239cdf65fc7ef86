"""`transform` of a `GraphModule`: the reflections are nodes of its own graph, which other passes can change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from adapting import randomise
from graph_modules import COPIES, IMAGES, Cnn, X, adapted, check_folded, config, graph_of, targets_of, traced
from layers.checking import assert_same, check
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.errors import AdapterError


def test_it_is_the_same_object_and_a_second_transform_does_nothing() -> None:
    model = traced()
    keys = list(model.state_dict())
    assert hra_fx.transform(model, config()) is model
    code, graph, vectors = model.code, model.graph, dict(model.named_parameters())
    assert hra_fx.transform(model, config()) is model
    assert model.code == code and model.graph is graph
    assert all(parameter is vectors[name] for name, parameter in model.named_parameters())
    assert [key for key in model.state_dict() if ".hra_u." not in key] == keys
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "first.hra_u.default",
        "second.hra_u.default",
    ]
    with pytest.raises(AdapterError, match="already has reflections of default, of another name or configuration"):
        hra_fx.transform(model, config(r=2))


def doubled(module: fx.GraphModule) -> None:
    output = module.graph.find_nodes(op="output")[0]
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(torch.mul, (output.args[0], 2.0)),)


def another_layer(module: fx.GraphModule) -> None:
    module.add_module("third", nn.Linear(4, 4).double())
    output = module.graph.find_nodes(op="output")[0]
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_module("third", output.args),)


@pytest.mark.parametrize("change", [doubled, another_layer])
def test_a_pass_of_the_users_after_transform(change: Callable[[fx.GraphModule], None]) -> None:
    base, model = adapted()
    for module in (base, model):
        torch.manual_seed(1)
        change(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    assert len(targets_of(base)) * 2 - len(targets_of(model)) == (change is another_layer)
    check(base, model, X)
    again = copy.deepcopy(base)
    assert hra_fx.fold(model).code == again.code


def test_any_later_error_leaves_the_graph_as_it_was() -> None:
    model = traced()
    code, graph, targets = model.code, model.graph, targets_of(model)
    with pytest.raises(hra_fx.errors.SelectionError):
        hra_fx.transform(model, config(modules_to_save=["nowhere"]))
    assert model.code == code and model.graph is graph and targets_of(model) == targets
    model = hra_fx.transform(model, config("first"))
    code = model.code
    with pytest.raises(hra_fx.errors.SelectionError):
        hra_fx.add_adapter(model, "other", config("nowhere"))
    assert model.code == code


def test_graphs_returns_a_copy_of_its_own_graph() -> None:
    _, model = adapted()
    code, own = model.code, dict(model.named_parameters())
    for inputs in (None, X):
        (graph,) = hra_fx.graphs(model, inputs).values()
        assert_same(graph(X), model(X))
        doubled(graph)
        graph.recompile()
        assert graph.code != code == model.code
        assert all(parameter is own[name] for name, parameter in graph.named_parameters())


def test_hra_model_is_refused() -> None:
    with pytest.raises(
        AdapterError, match=r"captured graph \(Mlp\)\. Call hra_fx\.transform\(model, config\), which ret"
    ):
        hra_fx.get_peft_model(traced(), config())


# ---- other tracers, and inside of other models ----


class Blocks(fx.Tracer):
    """Does not look into a Sequential."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Sequential) or super().is_leaf_module(m, module_qualified_name)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.block(x) + x)


def test_a_custom_tracer_whose_leaves_hold_layers() -> None:
    root = Nested().double()
    base = graph_of(root, Blocks())
    model = hra_fx.transform(copy.deepcopy(base), config("block.0", "block.2", "first"))
    randomise(model)
    assert targets_of(model) == ["block", "first.hra_u", "first"]
    check(base, model, X)
    for copied in COPIES:
        check(base, copied(model), X)
    check_folded(base, model, X)


def test_a_graph_module_inside_of_a_bigger_model() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = traced(Cnn)
            self.second = nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.inner(x)["out"])

    torch.manual_seed(0)
    base = Holder()
    model = hra_fx.transform(copy.deepcopy(base), config("inner.conv", "inner.first", "second"))
    randomise(model)
    check(base, model, IMAGES)
    check(base, copy.deepcopy(model), IMAGES)
    before = model.eval()(IMAGES)
    assert_same(hra_fx.fold(model)(IMAGES), before)
    assert model.inner.code == base.inner.code and list(model.state_dict()) == list(base.state_dict())
