r"""share: layers with the same input compute their reflected inputs together, with one skinny product for all.

    h1 = reflected_rows(x, u1)                    f = unit_factors([u1, u2]);  h = reflected_by(x, f[:2], f[2:])
    h2 = reflected_rows(x, u2)       becomes      h1 = h[0]
                                                  h2 = h[1]

The joined nodes replace the first of them. The nodes that compute the vectors of the others (several adapters,
Gram-Schmidt) are moved before it. Layers are not joined across a node that writes to a tensor or changes how operators
compute (autocast, gradient mode). Vectors never depend on the output of a layer, so moving them is safe.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import LayerOperators
from passes.side_effects import has_side_effects


class SharePass(PassBase):
    """Joins the reflections of each value that has at least two; a second run changes nothing."""

    def __init__(self, operators: LayerOperators) -> None:
        """Take the operators of reflected inputs."""
        self._rows, self._factors, self._by = operators.rows, operators.factors, operators.by

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        graph = graph_module.graph
        groups = [group for group in self._groups(graph) if len(group) > 1]
        for group in groups:
            self._join(graph, group)
        if groups:
            graph_module.recompile()
        return PassResult(graph_module, bool(groups))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed."""
        graph_module.graph.lint()

    def _groups(self, graph: fx.Graph) -> Iterator[list[fx.Node]]:
        """The reflections of each value between two nodes with side effects, in their order."""
        open_groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if has_side_effects(node):
                yield from open_groups.values()
                open_groups = {}
            elif node.target is self._rows:
                open_groups.setdefault(node.args[0], []).append(node)
        yield from open_groups.values()

    def _join(self, graph: fx.Graph, group: list[fx.Node]) -> None:
        first = group[0]
        for node in group[1:]:
            _move_before(node.args[1], first)
        with graph.inserting_before(first):
            factors = graph.call_function(self._factors, ([node.args[1] for node in group],))
            parts = [graph.call_function(operator.getitem, (factors, index)) for index in range(2 * len(group))]
            joined = graph.call_function(self._by, (first.args[0], parts[: len(group)], parts[len(group) :]))
            outputs = [graph.call_function(operator.getitem, (joined, index)) for index in range(len(group))]
        for node, output in zip(group, outputs, strict=True):
            output.meta = dict(node.meta)
            node.replace_all_uses_with(output)
            graph.erase_node(node)
        for node in (factors, *parts, joined):
            node.meta = {key: first.meta[key] for key in ("stack_trace", "nn_module_stack") if key in first.meta}


def _move_before(vectors: Any, first: fx.Node) -> None:
    """Move the nodes that compute the vectors before a node, unless they are there already."""
    later: list[fx.Node] = []
    stack = [vectors]
    while stack:
        node = stack.pop()
        if node > first and node not in later:
            later.append(node)
            stack += node.all_input_nodes
    for node in sorted(later):
        first.prepend(node)
