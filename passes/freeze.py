r"""freeze: what is made of adapters alone is computed once, and is a constant of the graph.

    t = f(u);  y = x - (x @ u) @ t      becomes      y = x - (x @ c_0) @ c_1

A value that is made of weights too is a constant where it is smaller than each of them (`W U`, as LoRA has it): a
rotated weight stays a thing of the graph, for as a constant it would be a folded one.
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

#: Makes the node of a constant: called with its value, and with the nodes of the vectors that it is made of.
Place = Callable[[Tensor, list[fx.Node]], fx.Node]


class FreezePass(PassBase):
    """Puts constants in the place of what the vectors of adapters are only a step to."""

    def __init__(self, tensors: Mapping[fx.Node, Tensor], vectors: Iterable[fx.Node], place: Place) -> None:
        """Prepare for one graph.

        Args:
            tensors: the nodes whose values do not change, weights and vectors -> their values.
            vectors: those of `tensors` that belong to adapters, in the order of the graph.
            place: makes the node of a constant.
        """
        self._tensors = tensors
        self._vectors = list(vectors)
        self._place = place

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        sources = self._sources(graph_module.graph)
        factors = {node for node in sources if self._is_factor(node, sources[node])}
        wanted = _wanted(graph_module.graph, sources, factors)
        made = self._values(graph_module.graph, factors & wanted)
        for node, value in made.items():
            constant = self._place(value, [vector for vector in self._vectors if vector in sources[node]])
            constant.meta |= {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
            node.replace_all_uses_with(constant)
        self._clear(graph_module.graph, sources)
        if made:
            graph_module.recompile()
        return PassResult(graph_module, bool(made))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed, and reads no vectors."""
        graph_module.graph.lint()
        for vector in self._vectors:
            for reader in vector.users:
                raise GraphInvariantError(
                    f"node {reader.name!r}: it reads {vector.name!r}, and what it gives is no constant. Export the "
                    "model in eval mode and without autocast, or leave the vectors as they are."
                )

    def _sources(self, graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
        """The nodes whose values do not change -> the tensors that they are made of; in the order of the graph."""
        found: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            if node in self._tensors:
                found[node] = frozenset([node])
            elif _is_function(node) and all(argument in found for argument in node.all_input_nodes):
                found[node] = frozenset().union(*(found[argument] for argument in node.all_input_nodes))
        return found

    def _is_factor(self, node: fx.Node, sources: frozenset[fx.Node]) -> bool:
        """Whether it is made of vectors, and smaller than every weight that it is made of."""
        value = node.meta.get("val")
        if node in self._tensors or sources.isdisjoint(self._vectors) or not isinstance(value, Tensor):
            return False
        return all(value.numel() < self._tensors[source].numel() for source in sources.difference(self._vectors))

    def _values(self, graph: fx.Graph, asked: set[fx.Node]) -> dict[fx.Node, Tensor]:
        needed, waiting = set(self._tensors), list(asked)
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        values: dict[fx.Node, Any] = dict(self._tensors)
        with torch.no_grad():
            for node in graph.nodes:
                if node in needed and node not in values:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
            # Of their own memory, also where they are views.
            return {
                node: values[node].clone(memory_format=torch.contiguous_format) for node in graph.nodes if node in asked
            }

    def _clear(self, graph: fx.Graph, sources: Mapping[fx.Node, frozenset[fx.Node]]) -> None:
        """Take out what only led to the constants, and the checks of it that nothing reads."""
        led = {node for node in sources if not sources[node].isdisjoint(self._vectors)}
        for node in list(sources)[::-1]:
            is_check = bool(node.all_input_nodes) and led.issuperset(node.all_input_nodes)
            if node not in self._tensors and not node.users and (node in led or is_check):
                led.update(node.all_input_nodes)
                graph.erase_node(node)


def _is_function(node: fx.Node) -> bool:
    """Whether it gives the same for the same, and changes nothing."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    # The dropouts are compositions, which torch does not tag.
    random = torch.Tag.nondeterministic_seeded in node.target.tags or "dropout" in schema_of(node.target).name
    return not random and not schema_of(node.target).is_mutable


def _wanted(graph: fx.Graph, fixed: Collection[fx.Node], factors: Collection[fx.Node]) -> set[fx.Node]:
    """What is still read once all factors are constants."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in fixed or any(user in wanted and user not in factors for user in node.users):
            wanted.add(node)
    return wanted
