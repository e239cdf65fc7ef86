"""Layers whose weight another module reads: every reader gets `W Q`, with gradients to every adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import config
from layers.checking import assert_same, check, check_fold, dense_weights, normal, pair, run_dense
from torch import Tensor, nn

import hra_fx


class ReadByAnother(nn.Module):
    """Reads the weight of a layer that it was given."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.given = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.given.weight)


class ReadAtTheCall(nn.Module):
    """Reads the weight of a layer that its call gives it."""

    def forward(self, x: Tensor, given: nn.Linear) -> Tensor:
        return F.linear(x, given.weight)


class Reading(nn.Module):
    """Three layers, `fc` read in one of the `USES`."""

    def __init__(self, use: str, branches: bool = False) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 6)
        self.after = nn.Linear(6, 4)
        self.at_the_call = ReadAtTheCall()
        if use == "called, and read by another module":
            self.another = ReadByAnother(self.fc)
        self.use, self.branches = USES[use], branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and float(x.detach().sum()) > 1e9:  # which no trace can answer
            x = x + 1
        return self.after(self.use(self, torch.tanh(self.before(x))))

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight


def by_metadata(model: Reading, x: Tensor) -> Tensor:
    """Asks the weight what it is, and makes tensors like it."""
    weight = model.fc.weight
    x = x.to(weight.dtype).to(weight.device) + torch.zeros_like(weight).sum() + weight.new_zeros(1)
    return F.linear(x, weight.reshape(weight.shape[0], weight.size(1)))


def by_loop(model: Reading, x: Tensor) -> Tensor:
    for layer in (model.fc, model.before):
        x = torch.tanh(F.linear(x, layer.weight))
    return x


USES: dict[str, Callable[[Reading, Tensor], Tensor]] = {
    "functional": lambda model, x: F.linear(x, model.fc.weight, model.fc.bias),
    "transposed": lambda model, x: x @ model.fc.weight.T + model.fc.weight.sum(0),
    # Otherwise than as a matrix on rows.
    "inside": lambda model, x: x @ torch.softmax(model.fc.weight, -1) @ model.fc.weight,
    "metadata": by_metadata,
    "property": lambda model, x: F.linear(x, model.matrix),
    "getattr": lambda model, x: F.linear(x, getattr(model.fc, "weight")),  # noqa: B009
    "loop": by_loop,
    "called and read": lambda model, x: model.fc(x) + F.linear(2 * x, model.fc.weight),
    "called, and read by another module": lambda model, x: model.fc(x) + model.another(x),
    "called, and given to another module": lambda model, x: model.fc(x) + model.at_the_call(x, model.fc),
}
X = normal(2, 3, 6)
TARGETS = "before|after|fc"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("branches", [False, True], ids=["traceable", "untraceable"])
def test_every_reader_gets_the_rotated_weight(use: str, branches: bool) -> None:
    base, model = pair(lambda: Reading(use, branches), TARGETS)
    check(base, model, X)
    assert type(check_fold(base, model, X)) is Reading


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3, "apply_GS": True}], ids=["even", "GS"])
def test_the_graph_of_a_reader_computes_what_the_model_does(use: str, fields: dict[str, Any]) -> None:
    base, model = pair(lambda: Reading(use), TARGETS, **fields)
    graph = hra_fx.graphs(model)[""]
    mine = {name: id(parameter) for name, parameter in model.named_parameters()}
    theirs = {name: id(parameter) for name, parameter in graph.named_parameters()}
    assert theirs.items() <= mine.items()
    assert {name for name in mine if ".hra_u." in name} <= theirs.keys()
    assert_same(graph(X), model(X), rtol=1e-14)
    assert_same(graph(X), run_dense(base, model, X))
    reads = [node for node in graph.graph.nodes if str(node.target).endswith(".hra_base")]
    assert len(reads) >= 1
    for node in reads:
        (reflection,) = node.users
        assert reflection.target == str(node.target).replace(".hra_base", ".hra_u")
        assert reflection.kwargs == {"weight": node} and not reflection.args


class Left(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.own = layer, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.layer(x))


class Right(Left):
    def forward(self, x: Tensor) -> Tensor:
        return self.own(F.linear(x, self.layer.weight))


class TwoParents(nn.Module):
    """One layer, called by one module and read by another; their parent cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.left, self.right = Left(shared), Right(shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.right(x if float(x.detach().sum()) < 1e9 else -x)


def test_called_by_one_parent_and_read_by_another() -> None:
    base, model = pair(TwoParents, ["layer", "own"])
    check(base, model, X)
    graphs = hra_fx.graphs(model)
    assert graphs.keys() == {"left", "right"}
    for name, graph in graphs.items():
        assert_same(graph(X), getattr(model, name)(X), rtol=1e-14)
    check_fold(base, model, X)


def test_a_reader_that_comes_after_the_adapters() -> None:
    base, model = pair(lambda: Reading("called and read"), TARGETS)
    hra_fx.add_adapter(model, "other", config("fc"))
    hra_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        model.fc.hra_u["other"].normal_()
    assert_same(model(X), run_dense(base, model, X, adapters=("default", "other")))
    wanted = dense_weights(base, model, ("default", "other"))["fc.weight"]
    assert_same(ReadByAnother(model.fc)(X), F.linear(X, wanted))
