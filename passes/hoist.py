r"""hoist: the factors of all layers of one shape are computed in one batch, at the top of the graph.

    h1 = reflected_rows(x, u1)                    f = unit_factors([u1, u2])
    h2 = reflected_rows(y, u2)       becomes      h1 = reflected_by(x, f[:1], f[2:3])[0]
                                                  h2 = reflected_by(y, f[1:2], f[3:])[0]

Only for vectors that are inputs of the graph, that no node writes to, and that are used in the gradient mode of the top
of the graph. Layers that share an input already (`passes.share`) keep doing so.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import LayerOperators
from passes.side_effects import grad_mode_after, has_side_effects

#: Key of the fake tensor of a value in `meta`, as TorchDynamo sets it.
_EXAMPLE = "example_value"


class HoistPass(PassBase):
    """Computes factors of equal shape together, at least two; a second run changes nothing."""

    def __init__(self, operators: LayerOperators) -> None:
        """Take the operators of reflected inputs."""
        self._rows, self._factors, self._by = operators.rows, operators.factors, operators.by

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        graph = graph_module.graph
        found: dict[Hashable, dict[fx.Node, None]] = {}
        for vectors in self._in_initial_grad_mode(graph):
            if (shape := self._shape(vectors)) is not None:
                found.setdefault(shape, {})[vectors] = None
        groups = [list(group) for group in found.values() if len(group) > 1 and not self._is_hoisted(list(group))]
        for group in groups:
            self._hoist(graph, group)
        if groups:
            graph_module.recompile()
        return PassResult(graph_module, bool(groups))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed."""
        graph_module.graph.lint()

    def _in_initial_grad_mode(self, graph: fx.Graph) -> list[fx.Node]:
        """Vectors that are only used in the gradient mode of the top of the graph."""
        first = torch.is_grad_enabled()
        modes: dict[fx.Node, set[bool | None]] = {}
        state: bool | None = first
        for node in graph.nodes:
            state = grad_mode_after(node, state)
            for vectors in self._vectors_of(node):
                modes.setdefault(vectors, set()).add(state)
        return [vectors for vectors, found in modes.items() if found == {first}]

    def _shape(self, vectors: fx.Node) -> Hashable:
        """Shape, dtype and device, which must be equal in a batch; `None` if not an input, or if written to."""
        example = vectors.meta.get(_EXAMPLE)
        if vectors.op != "placeholder" or example is None or self._is_written(vectors):
            return None
        return tuple(example.shape), example.dtype, example.device

    def _is_written(self, vectors: fx.Node) -> bool:
        """Whether a node may write to the vectors, directly or through a view or `.data`."""
        seen: set[fx.Node] = set()
        stack = list(vectors.users)
        while stack:
            node = stack.pop()
            if node in seen or node.target in (self._rows, self._factors):
                continue
            if has_side_effects(node):
                return True
            seen.add(node)
            stack += node.users
        return False

    def _vectors_of(self, node: fx.Node) -> list[Any]:
        if node.target is self._rows:
            return [node.args[1]]
        return list(node.args[0]) if node.target is self._factors else []  # type: ignore[arg-type]

    def _is_hoisted(self, group: list[fx.Node]) -> bool:
        """Whether one node computes the factors of exactly these already."""
        readers = {reader for vectors in group for reader in vectors.users if vectors in self._vectors_of(reader)}
        return len(readers) == 1 and next(iter(readers)).target is self._factors

    def _hoist(self, graph: fx.Graph, group: list[fx.Node]) -> None:
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            factors = graph.call_function(self._factors, (group,))
        with graph.inserting_after(factors):
            parts = [
                graph.call_function(operator.getitem, (factors, index)) for index in reversed(range(2 * len(group)))
            ]
        parts.reverse()
        pairs = {vectors: (parts[index], parts[len(group) + index]) for index, vectors in enumerate(group)}
        for node in list(graph.nodes):
            if node is factors:
                continue
            if node.target is self._rows and node.args[1] in pairs:
                self._use_factors(graph, node, *pairs[node.args[1]])
            elif node.target is self._factors and not pairs.keys().isdisjoint(node.args[0]):
                self._drop_vectors(graph, node, pairs)

    def _use_factors(self, graph: fx.Graph, node: fx.Node, chain: fx.Node, factor: fx.Node) -> None:
        with graph.inserting_before(node):
            reflected = graph.call_function(self._by, (node.args[0], [chain], [factor]))
            output = graph.call_function(operator.getitem, (reflected, 0))
        reflected.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output)
        graph.erase_node(node)

    def _drop_vectors(self, graph: fx.Graph, node: fx.Node, pairs: Mapping[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
        """Remove the vectors from a node whose factors another node computes now."""
        vectors: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        rest = [one for one in vectors if one not in pairs]
        with graph.inserting_before(node):
            factors = graph.call_function(self._factors, (rest,)) if rest else None
            own = {
                one: [graph.call_function(operator.getitem, (factors, index + shift)) for shift in (0, len(rest))]
                for index, one in enumerate(rest)
            }
        for item in list(node.users):
            kind, index = divmod(int(item.args[1]), len(vectors))  # type: ignore[arg-type]
            item.replace_all_uses_with({**own, **pairs}[vectors[index]][kind])
            graph.erase_node(item)
        graph.erase_node(node)
