"""The passes on graphs alone: what is matched, what is inserted, and that fold takes it all back."""

from __future__ import annotations

import copy
from typing import Any

import networkx as nx
import pytest
import torch
from oracles import dense_product, dense_weight
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import hra_fx
from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import META, LayerTarget, NodeTag
from passes.fold import FoldPass
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass


class Net(nn.Module):
    """Three sites, of which one is called twice and one by keyword, and a Linear that is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.body = nn.ModuleDict({"shared": nn.Linear(12, 12), "fc_1": nn.Linear(12, 12)})
        self.other = nn.Linear(12, 2)
        for site in (self.conv, *self.body.values()):
            site.add_module("hra_u", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        x = self.body["shared"](x) + self.body["shared"](x * 2)
        return self.other(self.body["fc_1"](input=x))


SITES = {
    "conv": LayerTarget("conv", "conv2d"),
    "body.shared": LayerTarget("body.shared", "linear"),
    "body.fc_1": LayerTarget("body.fc_1", "linear"),
}


def traced(model: nn.Module | None = None) -> fx.GraphModule:
    graph: fx.GraphModule = fx.symbolic_trace(Net() if model is None else model)
    return graph


def structure(graph: fx.Graph) -> nx.MultiDiGraph:
    """Nodes with op and target, edges with the places in which a value is read."""
    found = nx.MultiDiGraph()
    for node in graph.nodes:
        found.add_node(node.name, key=(node.op, node.target))
        places = [(str(place), value) for place, value in enumerate(node.args)] + sorted(node.kwargs.items())
        for place, value in places:
            fx.node.map_arg(
                value, lambda source, place=place, node=node: found.add_edge(source.name, node.name, place=place)
            )
    return found


def assert_isomorphic(a: fx.Graph, b: fx.Graph) -> None:
    """Equal up to names, by networkx, on op, target and order of arguments."""
    assert nx.is_isomorphic(
        structure(a),
        structure(b),
        node_match=lambda left, right: left["key"] == right["key"],
        edge_match=lambda left, right: (
            sorted(e["place"] for e in left.values()) == sorted(e["place"] for e in right.values())
        ),
    )


def notes(graph: fx.Graph) -> list[NodeTag]:
    return [node.meta[META] for node in graph.nodes if META in node.meta]


def inserted(graph: fx.GraphModule) -> fx.GraphModule:
    for step in (MatchPass(SITES), InsertPass()):
        step(graph)
    return graph


def test_match_marks_every_call_of_a_site_and_no_other() -> None:
    graph = traced()
    before = len(graph.graph.nodes)
    match = MatchPass(SITES)
    result = match(graph)
    assert isinstance(result, PassResult) and result.modified and result.graph_module is graph
    assert match.calls == {"conv": 1, "body.shared": 2, "body.fc_1": 1}
    assert [(note.path, note.kind, note.role) for note in notes(graph.graph)] == [
        ("conv", "conv2d", "layer"),
        ("body.shared", "linear", "layer"),
        ("body.shared", "linear", "layer"),
        ("body.fc_1", "linear", "layer"),
    ]
    assert len(graph.graph.nodes) == before
    assert META not in graph.graph.find_nodes(op="call_module", target="other")[0].meta


def test_match_again_changes_nothing_and_counts_anew() -> None:
    graph, match = traced(), MatchPass(SITES)
    assert match(graph).modified
    result = match(graph)
    assert not result.modified and sum(match.calls.values()) == 4


def test_match_knows_where_in_the_model_the_graph_stands() -> None:
    graph = traced()
    conv = LayerTarget("encoder.0.conv", "conv2d")
    match = MatchPass({"encoder.0.conv": conv, "body.shared": SITES["body.shared"]}, "encoder.0")
    match(graph)
    assert match.calls == {"encoder.0.conv": 1}
    assert notes(graph.graph) == [NodeTag("encoder.0.conv", "conv2d", "layer")]


def test_match_goes_by_target_and_not_by_the_names_of_nodes() -> None:
    """Node names are made up by fx: `body_fc_1` is a function here, and a site's call is named otherwise."""
    graph = traced()
    call = graph.graph.find_nodes(op="call_module", target="body.fc_1")[0]
    call.name, relu = "something", graph.graph.find_nodes(op="call_function", target=torch.relu)[0]
    relu.name = "body_fc_1_again"
    match = MatchPass(SITES)
    match(graph)
    assert match.calls["body.fc_1"] == 1 and META not in relu.meta and META in call.meta


def test_match_of_nothing() -> None:
    graph, match = traced(), MatchPass({})
    assert not match(graph).modified and match.calls == {} and notes(graph.graph) == []
    assert not InsertPass()(graph).modified
    assert not FoldPass()(graph).modified
    assert not VerifyPass()(graph).modified


def test_insert_adds_one_node_a_call() -> None:
    graph = traced()
    before = len(graph.graph.nodes)
    MatchPass(SITES)(graph)
    result = InsertPass()(graph)
    assert isinstance(result, PassResult) and result.modified and result.graph_module is graph
    assert len(graph.graph.nodes) == before + 4
    reflections = [node for node in graph.graph.nodes if META in node.meta and node.meta[META].role == "reflection"]
    assert [node.target for node in reflections] == [
        "conv.hra_u",
        "body.shared.hra_u",
        "body.shared.hra_u",
        "body.fc_1.hra_u",
    ]
    for node in reflections:
        (layer,) = node.users
        assert f"{layer.target}.hra_u" == node.target
        assert layer.args == (node.args[0], node) and not layer.kwargs and not node.kwargs
        assert node.meta[META] == NodeTag(layer.meta[META].path, layer.meta[META].kind, "reflection")
    graph.graph.lint()
    assert VerifyPass()(graph).modified is False


def test_insert_again_changes_nothing() -> None:
    graph = inserted(traced())
    before = str(graph.graph), graph.code
    assert not InsertPass()(graph).modified
    assert not MatchPass(SITES)(graph).modified
    assert (str(graph.graph), graph.code) == before


def test_insert_keeps_where_a_node_comes_from() -> None:
    graph = traced()
    call = graph.graph.find_nodes(op="call_module", target="conv")[0]
    call.meta["stack_trace"] = "model.py, line 3"
    call.meta["tensor_meta"] = "of the output"
    stack = call.meta["nn_module_stack"]
    inserted(graph)
    reflection = graph.graph.find_nodes(op="call_module", target="conv.hra_u")[0]
    assert reflection.meta["nn_module_stack"] == stack and reflection.meta["stack_trace"] == "model.py, line 3"
    assert "tensor_meta" not in reflection.meta
    assert call.meta["tensor_meta"] == "of the output" and call.meta["nn_module_stack"] == stack


def test_marks_survive_a_copy_of_the_graph() -> None:
    graph = copy.deepcopy(inserted(traced()))
    assert len(notes(graph.graph)) == 8
    assert not InsertPass()(graph).modified


def test_insert_refuses_a_call_without_a_traced_input() -> None:
    graph = traced()
    call = graph.graph.find_nodes(op="call_module", target="body.fc_1")[0]
    MatchPass(SITES)(graph)
    call.kwargs = {}
    call.args = (3.0,)
    with pytest.raises(GraphInvariantError, match=r"node 'body_fc_1'.*body\.fc_1 has no traced input"):
        InsertPass()(graph)


def test_fold_takes_back_what_insert_did() -> None:
    base, graph = traced(), inserted(traced())
    result = FoldPass()(graph)
    assert isinstance(result, PassResult) and result.modified and result.graph_module is graph
    assert len(graph.graph.nodes) == len(base.graph.nodes)
    assert notes(graph.graph) == []
    assert [node.name for node in graph.graph.nodes] == [node.name for node in base.graph.nodes]
    # The one call that was written layer(input=x) comes back as layer(x): the same call.
    plain = base.graph.find_nodes(op="call_module", target="body.fc_1")[0]
    plain.args, plain.kwargs = (plain.kwargs["input"],), {}
    assert_isomorphic(graph.graph, base.graph)


def test_fold_again_changes_nothing() -> None:
    graph = inserted(traced())
    assert FoldPass()(graph).modified
    assert not FoldPass()(graph).modified


def test_fold_without_insert_takes_the_marks_alone() -> None:
    graph, base = traced(), traced()
    MatchPass(SITES)(graph)
    FoldPass()(graph)
    assert notes(graph.graph) == []
    assert [node.op for node in graph.graph.nodes] == [node.op for node in base.graph.nodes]


def test_isomorphism_tells_a_graph_with_reflections_from_one_without() -> None:
    """The oracle of these tests can fail."""
    base, graph = traced(), inserted(traced())
    assert not nx.is_isomorphic(structure(base.graph), structure(graph.graph))
    minus, reverse = (
        fx.symbolic_trace(function) for function in (lambda a, b: a - b.relu(), lambda a, b: b.relu() - a)
    )
    with pytest.raises(AssertionError):
        assert_isomorphic(minus.graph, reverse.graph)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(x)) + self.shared(input=x)
        return self.head(x)


def adapted(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    base = copy.deepcopy(model.double())
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["shared", "head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hra_u" in name:
                parameter.normal_()
    return model, base


def test_a_layer_that_is_called_twice_and_by_keyword_computes_what_the_oracle_does() -> None:
    torch.manual_seed(0)
    model, base = adapted(Small())
    graph = hra_fx.graphs(model)[""]
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
        "shared.hra_u",
        "shared",
        "shared.hra_u",
        "shared",
        "head.hra_u",
        "head",
    ]
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for name in ("shared", "head"):
            layer = base.get_submodule(name)
            layer.weight.copy_(dense_weight(layer.weight, dense_product(model.get_submodule(name).hra_u["default"])))
        assert (graph(x) - base(x)).abs().max() < 1e-12
        assert (model(x) - base(x)).abs().max() < 1e-12


def test_the_graph_of_a_folded_model_is_the_graph_of_the_base_model() -> None:
    torch.manual_seed(0)
    model, base = adapted(Small())
    rewritten = hra_fx.graphs(model)[""]
    assert FoldPass()(rewritten).modified
    plain = traced(base)
    by_keyword: Any = [node for node in plain.graph.nodes if "input" in node.kwargs]
    for node in by_keyword:
        node.args, node.kwargs = (node.kwargs["input"],), {}
    assert by_keyword
    assert_isomorphic(rewritten.graph, plain.graph)
    hra_fx.fold(model)
    assert_isomorphic(traced(model).graph, traced(base).graph)
