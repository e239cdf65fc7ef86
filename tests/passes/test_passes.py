"""Match, insert and fold. `tests/tracing` and `tests/view` test what they do in models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_modules import COPIES, X, adapted, targets_of
from layers.checking import assert_same
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hra_fx
from hra_fx.errors import GraphInvariantError
from hra_fx.passes.fold import FoldPass
from hra_fx.passes.insert import InsertPass
from hra_fx.passes.match import find_uses


class Net(nn.Module):
    """Layers that are called, one by keyword, a weight that is read, and a weight of which only the dtype is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.other, self.named = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(F.linear(x.to(self.other.weight.dtype), self.read.weight))
        return self.named(input=torch.tanh(self.other(x)))


NAMES = ["read", "other", "named"]
CALLS = ["read.hra_u", "read.hra_u", "read", "other.hra_u", "other", "named.hra_u", "named"]


def every(path: str, layer: nn.Module) -> bool:
    return True


def test_match_finds_the_uses_of_selected_layers_without_a_reflection() -> None:
    base, model = adapted(Net, *NAMES)
    assert targets_of(model) == CALLS
    assert find_uses(base, every) == find_uses(model, every) == []
    FoldPass()(model)
    assert [node.target for node in find_uses(model, every)] == ["read.weight", *NAMES]
    found = find_uses(model, lambda path, layer: path != "other" and layer is not model.named)
    assert [node.target for node in found] == ["read.weight", "read"]


def test_fold_undoes_insert_which_takes_any_of_the_nodes() -> None:
    base, model = adapted(Net, *NAMES)
    wanted = model(X)
    plain = base.code.replace("input = ", "")  # a layer with a reflection is called by position
    for kept in (4, 2, 1):
        assert FoldPass()(model).modified and not FoldPass()(model).modified
        assert model.code == plain
        assert InsertPass(find_uses(model, every)[:kept])(model).modified
        assert sum(target.endswith(".hra_u") for target in targets_of(model)) == kept
        assert_same(model(X), wanted)  # other layers reflect their input themselves


def test_a_layer_that_is_called_with_a_constant_is_refused() -> None:
    _, model = adapted(Net, *NAMES)
    FoldPass()(model)
    uses = find_uses(model, every)
    uses[1].args = (None,)
    with pytest.raises(GraphInvariantError, match="node 'read': the call of read has no traced input"):
        InsertPass(uses)(model)


class Kinds(nn.Module):
    """A Linear, a grouped convolution, and an attention whose weight is read, which torch.export captures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.conv(1 * x if x.shape[0] > 1 else x).flatten(2).mT)
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


class Values(torch.fx.Interpreter):
    """Runs a graph, and compares each value with the `meta` of its node."""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        for seen, noted in zip(*map(pytree.tree_leaves, (value, n.meta.get("val"))), strict=False):
            if isinstance(noted, Tensor):
                sizes = [int(size) for size in noted.shape]
                assert (list(seen.shape), seen.dtype, seen.device) == (sizes, noted.dtype, noted.device), (
                    n.format_node()
                )
        return value


@pytest.mark.needs("torch>=2.9")
@pytest.mark.parametrize("r", [2, 3])  # an odd rank has an anchor
def test_the_nodes_of_reflections_have_the_shapes_and_dtypes_of_their_values(r: int) -> None:
    example = torch.randn(2, 4, 7, 7)
    settings = hra_fx.HRAConfig(r=r, target_modules=["conv", "fc", "attention", "out_proj"])
    model = hra_fx.transform(Kinds().eval(), settings, trace=True, example_inputs=example)
    reflections = [node for node in model.graph.nodes if str(node.target).endswith(".hra_u")]
    assert len(reflections) == 4 and all(node.meta["val"] is not None for node in reflections)
    assert_same(Values(model).run(example), model(example))


class Reads(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.read(self.other(x)) @ self.other.weight, self.read.weight)


@pytest.mark.needs("torch>=2.9")
@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_copies_rotate_each_weight_once_also_in_a_program(copied: Callable[[Any], Any]) -> None:
    base, model = adapted(Reads, *NAMES[:2])
    wanted = model(X)
    twin = copied(model)
    assert targets_of(twin) == targets_of(model)
    assert_same(twin(X), wanted)
    assert_same(torch.export.export(twin, (X,)).module()(X), wanted)
    assert_same(hra_fx.fold(twin)(X), wanted)
    assert [node.target for node in twin.graph.nodes] == [node.target for node in base.graph.nodes]
