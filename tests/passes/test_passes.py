"""Match, insert and fold. `tests/tracing` and `tests/view` test what they do in models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_modules import COPIES, X, adapted, targets_of, traced
from layers.checking import assert_same
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hra_fx
from hra_fx import passes
from hra_fx.errors import GraphInvariantError
from hra_fx.passes.fold import erase


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


def test_match_finds_the_uses_of_the_layers_that_a_configuration_selects() -> None:
    base, model = adapted(Net, *NAMES)
    every = ["read.weight", *NAMES]
    for settings, found in (
        ({"target_modules": NAMES}, every),
        ({"target_modules": NAMES, "exclude_modules": ["other"]}, ["read.weight", "read", "named"]),
        ({"target_modules": "n.*"}, ["named"]),
    ):
        assert [node.target for node in passes.match(base, hra_fx.HRAConfig(**settings))] == found
    assert passes.match(base) == []
    assert targets_of(model) == CALLS and [node.target for node in passes.match(model)] == NAMES
    assert [node.target for node in passes.match(erase(model))] == every


def test_insert_takes_any_of_the_nodes_and_does_nothing_the_second_time() -> None:
    base, model = adapted(Net, *NAMES)
    wanted, code = model(X), model.code
    assert passes.insert(model, passes.match(model)).code == code
    for kept in (4, 2, 1):
        assert erase(model).code == erase(model).code == base.code
        assert passes.insert(model, passes.match(model)[:kept]) is model
        assert sum(target.endswith(".hra_u") for target in targets_of(model)) == kept
        assert_same(model(X), wanted)  # other layers reflect their input themselves
    assert targets_of(passes.insert(model, passes.match(model))) == CALLS


def test_a_layer_that_is_called_with_a_constant_is_refused() -> None:
    _, model = adapted(Net, *NAMES)
    uses = passes.match(erase(model))
    uses[1].args = (None,)
    with pytest.raises(GraphInvariantError, match="node 'read': the call of read has no traced input"):
        passes.insert(model, uses)


def test_the_pass_does_not_fold_what_transform_added() -> None:
    _, model = adapted(Net, *NAMES)
    with pytest.raises(GraphInvariantError, match=r"Call hra_fx\.fold\(graph\)"):
        passes.fold(model)


class LoRA(nn.Module):
    """Another adapter: `y = W x + h` with `h = B A x`."""

    reflects_input, replaces_input = True, False

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, layer.in_features).double())
        self.b = nn.Parameter(torch.randn(layer.out_features, 2).double())

    def forward(self, x: Tensor | None = None, *, weight: Tensor | None = None) -> Any:
        return x @ self.a.T @ self.b.T if weight is None else weight + self.b @ self.a

    def value_in_graph(self, x: Tensor, output: Tensor) -> Tensor:
        return output


class LoRALinear(nn.Linear):
    def forward(self, input: Tensor, reflected: Tensor | None = None) -> Tensor:
        if "lora" in self._modules and reflected is None:
            reflected = self.lora(input)
        return super().forward(input) if reflected is None else super().forward(input) + reflected


def test_another_adapter_is_inserted_and_folded() -> None:
    def attach(graph_module: torch.fx.GraphModule) -> None:
        for name in NAMES:
            layer = graph_module.get_submodule(name)
            layer.__class__ = LoRALinear
            layer.add_module("lora", LoRA(layer))  # type: ignore[arg-type]

    base, settings = traced(Net), hra_fx.HRAConfig(target_modules=NAMES)
    model = copy.deepcopy(base)
    attach(model)
    weights = {name: (layer := model.get_submodule(name)).lora(weight=layer.weight) for name in NAMES}
    for _ in range(2):
        passes.insert(model, passes.match(model, settings, child="lora"), child="lora")
        assert targets_of(model) == [target.replace("hra_u", "lora") for target in CALLS]
    dense = copy.deepcopy(base)
    dense.load_state_dict(dense.state_dict() | {f"{name}.weight": weight for name, weight in weights.items()})
    assert_same(model(X), dense(X))
    assert passes.fold(model, child="lora").code == base.code and list(model.state_dict()) == list(base.state_dict())
    assert_same(model(X), dense(X))


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
@pytest.mark.parametrize("r", [2, 3])
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
