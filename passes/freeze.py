r"""freeze: compute values that only depend on adapters once, and store them as constants of the graph.

    t = f(u);  y = x - (x @ u) @ t      becomes      y = x - (x @ c_0) @ c_1

A value that also depends on weights becomes a constant if it is smaller than each of these weights (such as `W U`). A
rotated weight stays in the graph, because as a constant it would be a folded weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.compat import OpOverload, schema_of
from hra_fx.errors import GraphInvariantError

#: Adds a constant to the graph and returns its node. Called with the value and the nodes of the vectors behind it.
AddConstant = Callable[[Tensor, list[fx.Node]], fx.Node]


class FreezePass(PassBase):
    """Replaces values that depend on the vectors of adapters with constants."""

    def __init__(self, tensors: Mapping[fx.Node, Tensor], vectors: Iterable[fx.Node], add: AddConstant) -> None:
        """Prepare for one graph.

        Args:
            tensors: node of a weight or vector, which does not change -> its value.
            vectors: the nodes of `tensors` that belong to adapters, in the order of the graph.
            add: adds a constant.
        """
        self._tensors = tensors
        self._vectors = list(vectors)
        self._add = add

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        sources = self._sources(graph_module.graph)
        factors = {node for node in sources if self._is_factor(node, sources[node])}
        used = _used(graph_module.graph, sources, factors)
        values = self._compute(graph_module.graph, factors & used)
        for node, value in values.items():
            constant = self._add(value, [vector for vector in self._vectors if vector in sources[node]])
            constant.meta |= {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
            node.replace_all_uses_with(constant)
        self._remove_unused(graph_module.graph, sources)
        if values:
            graph_module.recompile()
        return PassResult(graph_module, bool(values))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph does not use vectors."""
        for vector in self._vectors:
            for reader in vector.users:
                raise GraphInvariantError(
                    f"node {reader.name!r}: its value depends on {vector.name!r} and is not constant. Export the "
                    "model in eval mode and without autocast, or do not freeze it."
                )

    def _sources(self, graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
        """Node whose value does not change -> the tensors that it depends on, in the order of the graph."""
        found: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            if node in self._tensors:
                found[node] = frozenset([node])
            elif _is_pure(node) and all(argument in found for argument in node.all_input_nodes):
                found[node] = frozenset().union(*(found[argument] for argument in node.all_input_nodes))
        return found

    def _is_factor(self, node: fx.Node, sources: frozenset[fx.Node]) -> bool:
        """Whether a value depends on vectors, and is smaller than every weight that it depends on."""
        value = node.meta.get("val")
        if node in self._tensors or sources.isdisjoint(self._vectors) or not isinstance(value, Tensor):
            return False
        return all(value.numel() < self._tensors[source].numel() for source in sources.difference(self._vectors))

    def _compute(self, graph: fx.Graph, wanted: set[fx.Node]) -> dict[fx.Node, Tensor]:
        needed, stack = set(self._tensors), list(wanted)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
        values: dict[fx.Node, Any] = dict(self._tensors)
        with torch.no_grad():
            for node in graph.nodes:
                if node in needed and node not in values:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
            # Clone the values, because a value may be a view.
            return {
                node: values[node].clone(memory_format=torch.contiguous_format)
                for node in graph.nodes
                if node in wanted
            }

    def _remove_unused(self, graph: fx.Graph, sources: Mapping[fx.Node, frozenset[fx.Node]]) -> None:
        """Remove the nodes that were only needed to compute the constants, and assertions about them."""
        removable = {node for node in sources if not sources[node].isdisjoint(self._vectors)}
        for node in list(sources)[::-1]:
            is_assertion = bool(node.all_input_nodes) and removable.issuperset(node.all_input_nodes)
            if node not in self._tensors and not node.users and (node in removable or is_assertion):
                removable.update(node.all_input_nodes)
                graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    """Whether a node is deterministic and without side effects."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    # Dropout operators are composite, and torch does not tag them.
    random = torch.Tag.nondeterministic_seeded in node.target.tags or "dropout" in schema_of(node.target).name
    return not random and not schema_of(node.target).is_mutable


def _used(graph: fx.Graph, fixed: Collection[fx.Node], factors: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that are still used when all factors are constants."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in fixed or any(user in used and user not in factors for user in node.users):
            used.add(node)
    return used
