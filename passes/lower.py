r"""lower: operators of ours by graphs of what they compute, for whoever knows those of aten alone.

    h = hra_fx.rotate(w, u, a, ...)     becomes     g = mm(t(u), u);  ...;  h = sub(w, mm(mm(w, u), ...))

What an operator computes is a function that is traced here, for the shapes that it has in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import META


class LowerPass(PassBase):
    """Puts the graphs of functions in the place of operators; all other nodes stay as they are."""

    def __init__(self, table: Mapping[Any, Callable[..., Tensor]]) -> None:
        """Prepare.

        Args:
            table: operator -> a function of the same arguments, made of operators of aten; it gives one tensor.
        """
        self._table = table

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        found = [node for node in graph_module.graph.nodes if node.op == "call_function" and node.target in self._table]
        for node in found:
            _replace(graph_module, node, self._table[node.target])
        if found:
            graph_module.recompile()
        return PassResult(graph_module, bool(found))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed."""
        graph_module.graph.lint()


def _replace(graph_module: fx.GraphModule, node: fx.Node, function: Callable[..., Tensor]) -> None:
    places = [place for place, argument in enumerate(node.args) if isinstance(argument, fx.Node)]

    def of_tensors(*tensors: Tensor) -> Tensor:
        arguments: list[Any] = list(node.args)
        for place, tensor in zip(places, tensors, strict=True):
            arguments[place] = tensor
        return function(*arguments, **node.kwargs)

    inputs: list[Any] = [node.args[place] for place in places]
    # Without data; with the shapes that the graph's values have already, if they have.
    traced = make_fx(of_tensors, tracing_mode="fake")(*(_example(graph_module, argument, node) for argument in inputs))
    traced.graph.eliminate_dead_code()
    known = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    where: dict[str, Any] = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    with graph_module.graph.inserting_before(node):
        made = graph_module.graph.graph_copy(traced.graph, known)
    assert isinstance(made, fx.Node)
    for inner in _between(made, inputs):
        inner.meta = {key: inner.meta[key] for key in ("val", "tensor_meta") if key in inner.meta}
        inner.meta.update(where)
    if META in node.meta:
        made.meta[META] = node.meta[META]
    node.replace_all_uses_with(made)
    graph_module.graph.erase_node(node)


def _between(last: fx.Node, inputs: list[fx.Node]) -> set[fx.Node]:
    """The nodes that `last` is made of, from the inputs on."""
    found: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in inputs:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _example(graph_module: fx.GraphModule, argument: fx.Node, node: fx.Node) -> Tensor:
    """A tensor of an argument's shape."""
    value = argument.meta.get("val")
    if value is None and argument.op == "get_attr":
        path, _, name = str(argument.target).rpartition(".")
        value = getattr(graph_module.get_submodule(path), name)
    if not isinstance(value, Tensor):
        raise GraphInvariantError(
            f"node {node.name!r}: nothing says of what shape its argument {argument.name!r} is, so what it computes "
            "cannot be traced. Lower the program that torch.export gave, with the notes on its nodes."
        )
    return value
