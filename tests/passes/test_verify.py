"""Each rule of `verify`, broken by hand: a GraphInvariantError that names the node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from hra_fx.errors import GraphInvariantError, HRAError
from hra_fx.layers.target import META, LayerTarget, NodeTag
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for layer in (self.first, self.second):
            layer.add_module("hra_u", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def rewritten() -> fx.GraphModule:
    graph: fx.GraphModule = fx.symbolic_trace(Net())
    MatchPass({name: LayerTarget(name, "linear") for name in ("first", "second")})(graph)
    InsertPass()(graph)
    return graph


def node_of(graph: fx.GraphModule, target: str) -> fx.Node:
    return graph.graph.find_nodes(op="call_module", target=target)[0]


def drop_the_reflection(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.args = node.args[:1]
    graph.graph.erase_node(node_of(graph, "second.hra_u"))


def add_an_argument(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.args = (*node.args, node.args[0])


def add_a_keyword(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.kwargs = {"scale": 2.0}


def read_the_reflection_of_another_layer(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.args = (node.args[0], node_of(graph, "first.hra_u"))


def read_a_value_for_a_reflection(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.args = (node.args[0], node.args[0])
    graph.graph.erase_node(node_of(graph, "second.hra_u"))


def read_a_number_for_a_reflection(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.args = (node.args[0], 3.0)
    graph.graph.erase_node(node_of(graph, "second.hra_u"))


def reflect_another_value(graph: fx.GraphModule) -> None:
    node_of(graph, "second.hra_u").args = (node_of(graph, "first"),)


def read_another_value(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    node.args = (node_of(graph, "first"), node.args[1])


def read_the_reflection_elsewhere(graph: fx.GraphModule) -> None:
    output = graph.graph.find_nodes(op="output")[0]
    output.args = ((output.args[0], node_of(graph, "first.hra_u")),)


def leave_a_reflection_unread(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second")
    with graph.graph.inserting_before(node):
        extra = graph.graph.call_module("second.hra_u", (node.args[0],))
    extra.meta[META] = NodeTag("second", "linear", "reflection")


def forget_the_mark_of_a_reflection(graph: fx.GraphModule) -> None:
    del node_of(graph, "second.hra_u").meta[META]


def put_something_else_for_the_mark(graph: fx.GraphModule) -> None:
    node_of(graph, "second.hra_u").meta[META] = {"role": "reflection"}


def give_the_reflection_two_inputs(graph: fx.GraphModule) -> None:
    node = node_of(graph, "second.hra_u")
    node.args = (*node.args, *node.args)


RULES: list[tuple[Callable[[fx.GraphModule], None], str]] = [
    (drop_the_reflection, "node 'second': calls an adapted layer with 1 arguments"),
    (add_an_argument, "node 'second': calls an adapted layer with 3 arguments"),
    (add_a_keyword, "node 'second': calls an adapted layer"),
    (read_the_reflection_of_another_layer, "node 'second|node 'first_hra_u'"),
    (
        read_a_value_for_a_reflection,
        "node 'second': calls second with tanh, which is not a reflection of that layer",
    ),
    (
        read_a_number_for_a_reflection,
        "node 'second': calls second with 3.0, which is not a reflection of that layer",
    ),
    (reflect_another_value, "node 'second': reads tanh, but its reflection reads first"),
    (read_another_value, "node 'second': reads first, but its reflection reads tanh"),
    (read_the_reflection_elsewhere, "node 'first_hra_u': is a reflection of first but is read by 'output'"),
    (leave_a_reflection_unread, "node 'second_hra_u_1': is an unused reflection"),
    (forget_the_mark_of_a_reflection, "node 'second_hra_u': calls a reflection but is not marked"),
    (put_something_else_for_the_mark, "node 'second_hra_u': calls a reflection but is not marked"),
    (give_the_reflection_two_inputs, "node 'second': reads tanh, but its reflection reads tanh"),
]


def test_a_good_graph_passes_and_is_not_changed() -> None:
    graph = rewritten()
    before = str(graph.graph)
    result = VerifyPass()(graph)
    assert result.graph_module is graph and not result.modified and str(graph.graph) == before


def test_a_graph_without_sites_passes() -> None:
    assert not VerifyPass()(fx.symbolic_trace(Net())).modified


@pytest.mark.parametrize(("breaks", "message"), RULES, ids=[breaks.__name__ for breaks, _ in RULES])
def test_a_broken_rule_names_the_node(breaks: Callable[[fx.GraphModule], None], message: str) -> None:
    graph = rewritten()
    breaks(graph)
    with pytest.raises(GraphInvariantError, match=message) as caught:
        VerifyPass()(graph)
    assert isinstance(caught.value, HRAError) and "please open an issue" in str(caught.value)


def test_a_graph_that_is_not_well_formed_is_refused() -> None:
    graph = rewritten()
    first, second = node_of(graph, "first.hra_u"), node_of(graph, "second")
    second.append(first)  # read before it is made
    with pytest.raises(Exception, match="first_hra_u"):
        VerifyPass()(graph)
