"""Create a GraphModule that shares the modules and parameters of another module.

Blocks with a separate graph, such as a block under `torch.no_grad`, become modules of a captured graph. fx unpickles a
graph by tracing its code, which would inline such a graph without its context, but calls of modules stay calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import fx, nn

from hra_fx.compat import NON_PERSISTENT, is_higher_order
from hra_fx.errors import CaptureError
from hra_fx.tracing.trace import Traced
from hra_fx.tracing.tracer import UnpicklingTracer


def graph_module(root: nn.Module, traced: Traced) -> fx.GraphModule:
    """Create a GraphModule with the modules and parameters of `root`, with the same names in the same order.

    The order determines the name of a shared layer for a configuration, and the states of an optimizer. fx itself keeps
    only the modules that the graph uses, in the order of the graph. If the graph only reads the weight of a layer, fx
    replaces the layer with an empty module, without the adapters.
    """
    module = fx.GraphModule(nn.Module(), fx.Graph(tracer_cls=UnpicklingTracer), type(root).__name__)
    for kind in ("_parameters", "_buffers", NON_PERSISTENT):
        vars(module)[kind] = copy.copy(vars(root)[kind])
    paths = {str(node.target) for node in traced.graph.find_nodes(op="call_module")} - traced.modules.keys()
    paths |= {str(node.target).rpartition(".")[0] for node in traced.graph.find_nodes(op="get_attr")}
    used = {root.get_submodule(path) for path in paths}
    holders: dict[nn.Module, nn.Module] = {}
    vars(module)["_modules"] = {name: _holder(child, used, holders) for name, child in root._modules.items()}
    for name, part in traced.modules.items():
        module.add_module(name, part.train(root.training))
    for node in traced.graph.find_nodes(op="get_attr"):
        if not hasattr(module, name := str(node.target).partition(".")[0]):
            setattr(module, name, getattr(root, name))  # a tensor that is not a buffer
    module.training = root.training
    module.graph = traced.graph
    return module


def _holder(part: nn.Module | None, used: set[nn.Module], holders: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """Return a part that the graph uses or that has tensors; otherwise, a new module with its children."""
    if part is None or part in used or part._parameters or part._buffers or not part._modules:
        return part
    if part not in holders:
        holder = holders[part] = nn.Module()
        holder.training = part.training
        vars(holder)["_modules"] = {name: _holder(child, used, holders) for name, child in part._modules.items()}
    return holders[part]


# --- captured graphs --------------------------------------------------------------------------------------------------


def attribute(owner: Any, path: Any) -> Any:
    """Look up an attribute by its dotted path; `None` if it does not exist."""
    return reduce(lambda part, name: getattr(part, name, None), str(path).split("."), owner)


class NestedGraph(nn.Module):
    """Calls an operator of `torch.export` that runs graphs."""

    def __init__(self, operator: str, bodies: Mapping[int, nn.Module]) -> None:
        """Store the name of the operator, and its graphs by their positions among the arguments."""
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
    """Create a GraphModule from a captured graph, with the modules and tensors of a model.

    Args:
        model: the model.
        parts: additional modules, and nested graphs.
        traced: the graph; it is changed.

    Raises:
        CaptureError: the model has an attribute with the name of one of the parts.
    """
    if taken := next((name for name in parts if hasattr(model, name)), None):
        raise CaptureError(f"its attribute {taken!r} has a name that a graph uses for itself. Rename it")
    nested = _call_nested(traced.graph, lambda path: parts[path] if path in parts else attribute(model, path))
    own = {name: part for name, part in parts.items() if not isinstance(part, fx.GraphModule)}
    return graph_module(model, Traced(traced.graph, {**own, **traced.modules, **nested}))


def _call_nested(graph: fx.Graph, find: Callable[[str], Any]) -> dict[str, nn.Module]:
    """Replace operators that have graphs as arguments with calls of modules, in place. Returns the modules.

    Args:
        graph: the graph.
        find: returns the value that a node reads, by its path.
    """
    made: dict[str, nn.Module] = {}
    for node in [node for node in graph.nodes if is_higher_order(node.target)]:
        reads = {place: arg for place, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"}
        bodies = {place: find(str(read.target)) for place, read in reads.items()}
        bodies = {place: body for place, body in bodies.items() if isinstance(body, fx.GraphModule)}
        for body in bodies.values():
            for name, part in _call_nested(body.graph, partial(attribute, body)).items():
                body.add_module(name, part)
            body.recompile()
        name = f"nested_{len(made)}"
        made[name] = NestedGraph(str(node.target), bodies)
        with graph.inserting_before(node):
            args = tuple(arg for place, arg in enumerate(node.args) if place not in bodies)
            call = graph.create_node("call_module", name, args, node.kwargs)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        for read in reads.values():
            if not read.users:
                graph.erase_node(read)
    return made
