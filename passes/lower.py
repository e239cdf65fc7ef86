r"""lower: replace custom operators with graphs of ATen operators, for exporters.

    h = hra_fx.rotate(w, u, a, ...)     becomes     g = mm(t(u), u);  ...;  h = sub(w, mm(mm(w, u), ...))

Each operator has a decomposition: a function that is traced with the shapes of the operator in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.errors import GraphInvariantError


class LowerPass(PassBase):
    """Replaces operators with the graphs of their decompositions. All other nodes do not change."""

    def __init__(self, decompositions: Mapping[Any, Callable[..., Tensor]]) -> None:
        """Store the decompositions.

        Args:
            decompositions: operator -> a function with the same arguments that uses ATen operators and returns one
                tensor.
        """
        self._decompositions = decompositions

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        found = [node for node in calls if node.target in self._decompositions]
        for node in found:
            _replace(graph_module, node, self._decompositions[node.target])
        if found:
            graph_module.recompile()
        return PassResult(graph_module, bool(found))


def _replace(graph_module: fx.GraphModule, node: fx.Node, function: Callable[..., Tensor]) -> None:
    indices = [index for index, argument in enumerate(node.args) if isinstance(argument, fx.Node)]

    def of_tensors(*tensors: Tensor) -> Tensor:
        arguments: list[Any] = list(node.args)
        for index, tensor in zip(indices, tensors, strict=True):
            arguments[index] = tensor
        return function(*arguments, **node.kwargs)

    inputs: list[Any] = [node.args[index] for index in indices]
    # Use fake tensors, because those in the graph keep their symbolic shapes.
    traced = make_fx(of_tensors, tracing_mode="fake")(*(_example(argument, node) for argument in inputs))
    traced.graph.eliminate_dead_code()
    replacements = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    location: dict[str, Any] = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    with graph_module.graph.inserting_before(node):
        result = graph_module.graph.graph_copy(traced.graph, replacements)
    assert isinstance(result, fx.Node)
    for inner in _between(result, inputs):
        inner.meta = {key: inner.meta[key] for key in ("val", "tensor_meta") if key in inner.meta}
        inner.meta.update(location)
    node.replace_all_uses_with(result)
    graph_module.graph.erase_node(node)


def _between(last: fx.Node, inputs: list[fx.Node]) -> set[fx.Node]:
    """The nodes that compute `last` from the inputs."""
    found: set[fx.Node] = set()
    stack = [last]
    while stack:
        node = stack.pop()
        if node not in found and node not in inputs:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _example(argument: fx.Node, node: fx.Node) -> Tensor:
    """Create a tensor with the shape of an argument."""
    value = argument.meta.get("val")
    if not isinstance(value, Tensor):
        raise GraphInvariantError(
            f"node {node.name!r}: the shape of its argument {argument.name!r} is unknown, so it cannot be traced. "
            "Lower a program of torch.export: its nodes have `meta['val']`."
        )
    return value
