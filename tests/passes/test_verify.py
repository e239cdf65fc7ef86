"""What the pass verify refuses: each broken rule of a transformed graph is an error that names the node.

The other passes have their tests where they are used: `tests/tracing` (match, insert, fold) and
`tests/export/exporting` (lower, freeze).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_modules import config, targets_of
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import META, NodeTag
from passes.verify import VerifyPass


class Net(nn.Module):
    """A weight that is read, one of which only the dtype is read, and layers that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.other, self.named = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(F.linear(x.to(self.other.weight.dtype), self.read.weight))
        return self.named(input=torch.tanh(self.other(x)))


def transformed() -> fx.GraphModule:
    return hra_fx.transform(fx.symbolic_trace(Net()), config("read", "other", "named"))


def find(module: fx.GraphModule, target: object) -> fx.Node:
    """The first node with this target."""
    return next(node for node in module.graph.nodes if node.target == target)


def read_the_bare_weight(module: fx.GraphModule) -> None:
    find(module, "read.hra_base").target = "read.weight"


def read_the_weight_beside_its_reflection(module: fx.GraphModule) -> None:
    linear = find(module, F.linear)
    linear.args = (linear.args[0], find(module, "read.hra_base"))


def reflect_a_weight_twice(module: fx.GraphModule) -> None:
    base, output = find(module, "read.hra_base"), module.graph.output_node()
    (reflection,) = base.users
    with module.graph.inserting_after(reflection):
        again = module.graph.call_module("read.hra_u", kwargs={"weight": base})
    again.meta[META] = reflection.meta[META]
    output.args = ((output.args[0], again),)


def leave_a_reflection_unread(module: fx.GraphModule) -> None:
    linear = find(module, F.linear)
    linear.args = (linear.args[0], linear.args[0])


def remove_the_mark(module: fx.GraphModule) -> None:
    del find(module, "read.hra_u").meta[META]


def remove_the_mark_of_the_weight(module: fx.GraphModule) -> None:
    del find(module, "read.hra_base").meta[META]


def remove_the_reflection_of_a_call(module: fx.GraphModule) -> None:
    call = find(module, "named")
    call.args = call.args[:1]
    module.graph.erase_node(find(module, "named.hra_u"))


def read_the_reflection_of_another_layer(module: fx.GraphModule) -> None:
    call = find(module, "named")
    call.args = (call.args[0], find(module, "other.hra_u"))


def reflect_another_value(module: fx.GraphModule) -> None:
    reflection = find(module, "named.hra_u")
    reflection.args = (find(module, "read"), *reflection.args[1:])


def read_the_reflection_elsewhere(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    output.args = ((output.args[0], find(module, "named.hra_u")),)


RULES: list[tuple[Callable[[fx.GraphModule], None], str]] = [
    (read_the_bare_weight, "node 'read_weight': reads read.weight, expected hra_base and its reflection"),
    (read_the_weight_beside_its_reflection, "node 'read_weight': is the weight of an adapted layer but is read by"),
    (reflect_a_weight_twice, "node 'read_weight': is the weight of an adapted layer but has 2 reflections, expected"),
    (leave_a_reflection_unread, "node 'read_hra_u': is an unused reflection"),
    (remove_the_mark, "node 'read_hra_u': calls a reflection but is not marked"),
    (remove_the_mark_of_the_weight, "node 'read_weight': reads a base weight but is not marked"),
    (remove_the_reflection_of_a_call, "node 'named': calls an adapted layer with 1 arguments, expected the input"),
    (read_the_reflection_of_another_layer, "node 'other_hra_u': is a reflection of other but is read by 'named'"),
    (reflect_another_value, "node 'named': reads tanh, but its reflection reads read"),
    (read_the_reflection_elsewhere, "node 'named_hra_u': is a reflection of named but is read by 'output'"),
]


@pytest.mark.parametrize(("breaks", "message"), RULES, ids=[breaks.__name__ for breaks, _ in RULES])
def test_a_broken_rule_names_the_node(breaks: Callable[[fx.GraphModule], None], message: str) -> None:
    module = transformed()
    assert not VerifyPass()(module).modified
    breaks(module)
    with pytest.raises(GraphInvariantError) as caught:
        VerifyPass()(module)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("This is a bug in hra_fx; please open an issue.")


def test_each_node_of_an_adapted_layer_is_marked() -> None:
    module = transformed()
    notes = [(node.target, node.meta[META]) for node in module.graph.nodes if META in node.meta]
    assert notes[:4] == [
        ("read.hra_base", NodeTag("read", "linear", "weight")),
        ("read.hra_u", NodeTag("read", "linear", "reflection")),
        ("read.hra_u", NodeTag("read", "linear", "reflection")),
        ("read", NodeTag("read", "linear", "layer")),
    ]
    assert [target for target, _ in notes[1:]] == targets_of(module)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


def test_the_call_of_a_module_names_all_adapted_layers_in_it() -> None:
    (graph,) = hra_fx.graphs(hra_fx.transform(Attends(), config("attn", "attn.out_proj"))).values()
    notes = [node.meta[META] for node in graph.graph.nodes if META in node.meta]
    assert notes == [NodeTag("attn", "attention", "reader", ("attn.out_proj",))]
