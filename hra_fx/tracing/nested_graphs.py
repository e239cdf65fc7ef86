"""Blocks with a graph of their own, such as one under `torch.no_grad`, as modules of a captured graph.

fx unpickles a graph by tracing its code, which would inline such a graph without its context. Modules stay calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from hra_fx.compat import is_higher_order
from hra_fx.tracing.graph_module import attribute, graph_module, with_parts
from hra_fx.tracing.trace import Traced


class NestedGraph(nn.Module):
    """Calls an operator of `torch.export` that runs graphs.

    Example:
        >>> double = fx.symbolic_trace(nn.Identity())
        >>> block = NestedGraph("wrap_with_set_grad_enabled", {1: double})
        >>> block(False, torch.ones(1, requires_grad=True)).requires_grad
        True
    """

    def __init__(self, operator: str, bodies: Mapping[int, nn.Module]) -> None:
        """Store the name of the operator, and its graphs by their places among its arguments."""
        super().__init__()
        self.operator = operator
        self.bodies = nn.ModuleDict({str(place): body for place, body in bodies.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator with its graphs and all other arguments."""
        given: list[Any] = list(args)
        for place, body in self.bodies.items():
            given.insert(int(place), body)
        return getattr(torch.ops.higher_order, self.operator)(*given, **kwargs)


def captured_module(model: nn.Module, parts: Mapping[str, nn.Module], traced: Traced) -> fx.GraphModule:
    """A GraphModule of a captured graph, over the modules and tensors of a model.

    Args:
        model: the model.
        parts: more modules, and nested graphs.
        traced: the graph, which is changed.
    """
    root = with_parts(model, parts)
    _call_nested(traced.graph, root)
    return graph_module(root, traced)


def _call_nested(graph: fx.Graph, owner: nn.Module) -> None:
    for number, node in enumerate([node for node in graph.nodes if is_higher_order(node.target)]):
        reads = {place: arg for place, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"}
        bodies = {place: attribute(owner, read.target) for place, read in reads.items()}
        bodies = {place: body for place, body in bodies.items() if isinstance(body, fx.GraphModule)}
        for body in bodies.values():
            _call_nested(body.graph, body)
            body.recompile()
        name = f"nested_{number}"
        owner.add_module(name, NestedGraph(str(node.target), bodies))
        with graph.inserting_before(node):
            call = graph.call_module(name, tuple(arg for place, arg in enumerate(node.args) if place not in bodies))
        call.kwargs, call.meta = node.kwargs, dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        for read in reads.values():
            if not read.users:
                graph.erase_node(read)
