r"""hoist: the factors of all sites of one shape are made in one batch, before anything that reads them.

    h1 = reflected_rows(x, u1)                    f = unit_factors([u1, u2])
    h2 = reflected_rows(y, u2)       becomes      h1 = reflected_by(x, f[:1], f[2:3])[0]
                                                  h2 = reflected_by(y, f[1:2], f[3:])[0]

Only of vectors that are inputs of the graph as they are, that nothing writes into, and that are read where gradients
are on, or off, as at the beginning. Sites that share a value already (`passes.share`) keep doing so.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import SiteOperators
from passes.side_effects import grad_mode_after, writes

#: What TorchDynamo notes of a value: a tensor without data.
_EXAMPLE = "example_value"


class HoistPass(PassBase):
    """Makes factors of equal shape together, two at least; a second run changes nothing."""

    def __init__(self, operators: SiteOperators) -> None:
        """Prepare for graphs in which these operators stand for sites."""
        self._rows, self._factors, self._by = operators.rows, operators.factors, operators.by

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        graph = graph_module.graph
        found: dict[Hashable, dict[fx.Node, None]] = {}
        for vectors in self._as_at_the_top(graph):
            if (shape := self._shape(vectors)) is not None:
                found.setdefault(shape, {})[vectors] = None
        groups = [list(group) for group in found.values() if len(group) > 1 and not self._is_made(list(group))]
        for group in groups:
            self._make(graph, group)
        if groups:
            graph_module.recompile()
        return PassResult(graph_module, bool(groups))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed."""
        graph_module.graph.lint()

    def _as_at_the_top(self, graph: fx.Graph) -> list[fx.Node]:
        """Vectors that are read with gradients on, or off, as where the graph begins, wherever they are read."""
        first = torch.is_grad_enabled()
        modes: dict[fx.Node, set[bool | None]] = {}
        state: bool | None = first
        for node in graph.nodes:
            state = grad_mode_after(node, state)
            for vectors in self._vectors(node):
                modes.setdefault(vectors, set()).add(state)
        return [vectors for vectors, found in modes.items() if found == {first}]

    def _shape(self, vectors: fx.Node) -> Hashable:
        """What sites must have in common to be made together; `None` for those that are no input, or written into."""
        example = vectors.meta.get(_EXAMPLE)
        if vectors.op != "placeholder" or example is None or self._is_written(vectors):
            return None
        return tuple(example.shape), example.dtype, example.device

    def _is_written(self, vectors: fx.Node) -> bool:
        """Whether somebody may write into the vectors, by themselves or by what is made of them (a view, `.data`)."""
        seen: set[fx.Node] = set()
        waiting = list(vectors.users)
        while waiting:
            node = waiting.pop()
            if node in seen or node.target in (self._rows, self._factors):
                continue
            if writes(node):
                return True
            seen.add(node)
            waiting += node.users
        return False

    def _vectors(self, node: fx.Node) -> list[Any]:
        if node.target is self._rows:
            return [node.args[1]]
        return list(node.args[0]) if node.target is self._factors else []  # type: ignore[arg-type]

    def _is_made(self, group: list[fx.Node]) -> bool:
        """Whether one node makes the factors of just these already."""
        readers = {reader for vectors in group for reader in vectors.users if vectors in self._vectors(reader)}
        return len(readers) == 1 and next(iter(readers)).target is self._factors

    def _make(self, graph: fx.Graph, group: list[fx.Node]) -> None:
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            made = graph.call_function(self._factors, (group,))
        with graph.inserting_after(made):
            parts = [graph.call_function(operator.getitem, (made, index)) for index in reversed(range(2 * len(group)))]
        parts.reverse()
        pairs = {vectors: (parts[index], parts[len(group) + index]) for index, vectors in enumerate(group)}
        for node in list(graph.nodes):
            if node is made:
                continue
            if node.target is self._rows and node.args[1] in pairs:
                self._by_pair(graph, node, *pairs[node.args[1]])
            elif node.target is self._factors and not pairs.keys().isdisjoint(node.args[0]):
                self._without(graph, node, pairs)

    def _by_pair(self, graph: fx.Graph, node: fx.Node, chain: fx.Node, factor: fx.Node) -> None:
        with graph.inserting_before(node):
            turned = graph.call_function(self._by, (node.args[0], [chain], [factor]))
            output = graph.call_function(operator.getitem, (turned, 0))
        turned.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output)
        graph.erase_node(node)

    def _without(self, graph: fx.Graph, node: fx.Node, pairs: Mapping[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
        """Leave to a node those vectors only that are not made elsewhere now."""
        vectors: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        rest = [one for one in vectors if one not in pairs]
        with graph.inserting_before(node):
            made = graph.call_function(self._factors, (rest,)) if rest else None
            own = {
                one: [graph.call_function(operator.getitem, (made, index + shift)) for shift in (0, len(rest))]
                for index, one in enumerate(rest)
            }
        for item in list(node.users):
            kind, index = divmod(int(item.args[1]), len(vectors))  # type: ignore[arg-type]
            item.replace_all_uses_with({**own, **pairs}[vectors[index]][kind])
            graph.erase_node(item)
        graph.erase_node(node)
