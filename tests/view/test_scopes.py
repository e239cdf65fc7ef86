"""From models to leaves and scopes: every site once, values as they flow in the captured graph."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import torch
import torchvision
from drawn_models import Residual
from torch import Tensor, nn

import hra_fx
from hra_fx.view.graph import leaves_of
from hra_fx.view.scopes import scope_tree
from hra_fx.view.subject import subject_of
from hra_fx.view.tree import Item, Leaf, Scope


def adapted(model: nn.Module, targets: str | list[str] = r"(.*\.)?fc\d*", r: int = 2) -> nn.Module:
    return hra_fx.transform(model.eval(), hra_fx.HRAConfig(r=r, target_modules=targets))


def tree(model: nn.Module) -> Scope:
    return scope_tree(leaves_of(subject_of(model, hra_fx.graphs(model))), "model")


def leaves(item: Item) -> Iterator[Leaf]:
    if isinstance(item, Leaf):
        yield item
    else:
        for part in item.items:
            yield from leaves(part)


def scopes(item: Item) -> Iterator[Scope]:
    if isinstance(item, Scope):
        yield item
        for part in item.items:
            yield from scopes(part)


class Pair(nn.Module):
    """Both layers belong to one module whose own forward is never called, so their order is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Pair(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.b.fc2(self.a.fc2(self.b.fc1(self.a.fc1(x))))


def test_sites_reach_each_other_as_in_the_captured_graph() -> None:
    model = adapted(torchvision.models.resnet18(), r".*(conv\d|downsample\.0|fc)")
    captured = hra_fx.graphs(model)[""]
    flow = nx.DiGraph((source, node) for node in captured.graph.nodes for source in node.all_input_nodes)
    layers = {node: node.meta["hra"].path for node in flow if "hra" in node.meta and node.meta["hra"].role == "layer"}
    want = {(layers[a], layers[b]) for a in layers for b in nx.descendants(flow, a) & layers.keys()}
    picture = leaves_of(subject_of(model, {"": captured}))
    drawn = {key: data["leaf"].target for key, data in picture.nodes(data=True) if data["leaf"].kind == "adapted_layer"}
    assert {(drawn[a], drawn[b]) for a in drawn for b in nx.descendants(picture, a) & drawn.keys()} == want
    assert len(drawn) == 21


def test_a_residual_block_keeps_its_skip_edge() -> None:
    (block,) = [
        scope for scope in scopes(tree(adapted(nn.Sequential(Residual(), nn.Tanh())))) if scope.class_name == "Residual"
    ]
    assert [item.name for item in block.items] == ["fc1", "act", "fc2", "add"]
    assert block.edges == ((0, 1), (1, 2), (2, 3))
    assert block.inputs == (0, 3)
    assert block.outputs == (3,)


def test_identical_blocks_are_counted_and_different_ones_are_not() -> None:
    model = adapted(nn.Sequential(*(Residual() for _ in range(5)), nn.ReLU()))
    blocks = [scope for scope in scopes(tree(model)) if scope.class_name == "Residual"]
    assert [(scope.count, len(scope.marks)) for scope in blocks] == [(5, 10)]
    hra_fx.transform(
        other := nn.Sequential(Residual(), Residual()).eval(), hra_fx.HRAConfig(r=2, target_modules=["0.fc1"])
    )
    assert [scope.count for scope in scopes(tree(other)) if scope.class_name == "Residual"] == [1, 1]


def test_calls_of_two_modules_that_alternate_are_no_cycle() -> None:
    root = tree(adapted(Interleaved()))
    assert [item.name for item in root.items if isinstance(item, Leaf) and item.kind == "adapted_layer"] == [
        "a.fc1",
        "b.fc1",
        "a.fc2",
        "b.fc2",
    ]
    assert all(i < j for i, j in root.edges)
    assert len(root.marks) == 4


def test_parameters_are_folded_into_what_reads_them_and_identities_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.skip = nn.Identity()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(self.fc(x) * self.scale).reshape(x.shape[0], -1)

    root = tree(adapted(Net()))
    assert [(item.name, item.detail) for item in root.items if isinstance(item, Leaf)] == [
        ("x", ""),
        ("fc", "Linear 4→4"),
        ("mul", "scale"),
        ("reshape", ""),
        ("output", ""),
    ]
    assert root.edges == ((0, 1), (1, 2), (2, 3), (3, 4))
