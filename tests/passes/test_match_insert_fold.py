"""The passes on graphs alone: what is matched, what is inserted, and that fold takes it all back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

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
    # The one call that was written layer(input=x) comes back as layer(x): the same call.
    plain = base.graph.find_nodes(op="call_module", target="body.fc_1")[0]
    plain.args, plain.kwargs = (plain.kwargs["input"],), {}
    assert [node.format_node() for node in graph.graph.nodes] == [node.format_node() for node in base.graph.nodes]
    assert not FoldPass()(graph).modified


def test_fold_without_insert_takes_the_marks_alone() -> None:
    graph, base = traced(), traced()
    MatchPass(SITES)(graph)
    FoldPass()(graph)
    assert notes(graph.graph) == []
    assert [node.op for node in graph.graph.nodes] == [node.op for node in base.graph.nodes]
