"""Merge the graphs of train and eval mode into one:

    y = dropout(x, 0.1, training=True)          becomes      t = by_mode_0();  y = dropout(x, 0.1, training=t)
    if self.training: x = x + rand_like(x)      becomes      x = by_mode_1(x)[0]

`by_mode_0` is a module that returns one constant in train mode and another in eval mode; `by_mode_1` has a graph for
each mode, with the operators that the other mode does not have. So `train()`, `eval()`, copies and pickles of the graph
work as for any other module. Calls of layers with parameters must be the same in both modes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, fx, nn

from hra_fx.compat import schema_of
from hra_fx.errors import CaptureError
from hra_fx.passes.nodes import attribute, line_of
from hra_fx.selection.origin import GraphPart


class ByMode(GraphPart):
    """Returns one constant in train mode and another in eval mode, or runs one of two graphs.

    A tensor that the forward of a model creates is also such a constant. It is not a buffer: it is not in the
    `state_dict`, and `to(dtype)` does not change it.

    Attributes:
        parts: modules of the graph that it does not call, so that they do not have a mode of their own.
    """

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        """Store both constants, or both graphs."""
        super().__init__()
        self.in_train = in_train
        self.in_eval = in_eval
        self.parts: tuple[nn.Module, ...] = ()

    def forward(self, *values: Any) -> Any:
        """Return the constant of the current mode, if it is a tensor on the device `values[0]`; or run its graph."""
        if any(part.training is not self.training for part in self.parts):
            raise AssertionError(
                "parts of the graph have different modes, and it is right only if all have the same. Call "
                "graph.train() or graph.eval(), or use the original model."
            )
        own = self.in_train if self.training else self.in_eval
        if isinstance(own, fx.GraphModule):
            return own(*values)
        return own.to(*values) if isinstance(own, Tensor) else own

    def extra_repr(self) -> str:
        """Show both constants."""
        return "" if self._modules else f"train={self.in_train!r}, eval={self.in_eval!r}"


def merge_modes(model: nn.Module, in_train: fx.Graph, in_eval: fx.Graph) -> dict[str, nn.Module]:
    """Change the graph of train mode into a graph for both modes, in place. Returns the modules to add to it."""
    merge = _Merge(model, in_train)
    ours, theirs = list(in_train.nodes), list(in_eval.nodes)
    forms = [*map(_form, ours)], [*map(_form, theirs)]
    first = other = 0
    for start, begin, size in SequenceMatcher(None, *forms, autojunk=False).get_matching_blocks():
        if size:  # the last block is empty
            merge.add_section(ours[first:start], theirs[other:begin], ours[start])
        for offset in range(size):
            merge.add_pair(ours[start + offset], theirs[begin + offset])
        first, other = start + size, begin + size
    return merge.finished()


class _Section:
    """A call of `ByMode` with the nodes that only one mode has, and the pairs of values that it returns."""

    def __init__(self, call: fx.Node, in_train: Sequence[fx.Node] = (), in_eval: Sequence[fx.Node] = ()) -> None:
        self.call, self.bodies = call, (in_train, in_eval)
        self.results: list[tuple[Any, Any]] = []


class _Merge:
    """The graph of train mode, which becomes that of both modes.

    Attributes:
        modules: those to add to the graph.
        known: node of eval mode -> the node of this graph with the same value.
        sections: in the order of the graph.
        owners: node that only one mode has -> its section.
        made: pair of values, as text -> the node that has one in train mode and the other in eval mode.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._model, self._graph = model, graph
        self.modules: dict[str, nn.Module] = {}
        self.known: dict[fx.Node, fx.Node] = {}
        self.sections: list[_Section] = []
        self.owners: dict[fx.Node, _Section] = {}
        self.made: dict[str, fx.Node] = {}

    def add_section(self, ours: Sequence[fx.Node], theirs: Sequence[fx.Node], end: fx.Node) -> None:
        """Move the nodes of one mode into a call before `end`. Reads of tensors and constants stay in the graph."""
        in_train = [node for node in ours if not self._is_read(node)]
        in_eval = [node for node in theirs if not self._is_read(node)]
        with self._graph.inserting_before(end):
            for node in theirs:
                if node not in in_eval:
                    self.known[node] = self._graph.node_copy(node, lambda value: self._in_graph(value, 1))
            if in_train or in_eval:
                section = self._call(in_train, in_eval)
                self.owners.update(dict.fromkeys([*in_train, *in_eval], section))

    def _is_read(self, node: fx.Node) -> bool:
        """Whether a node reads a tensor or a constant. Raises an error for a call of a layer."""
        if node.op != "call_module":
            return node.op == "get_attr"
        module = attribute(self._model, node.target)
        if module is not None and any(True for _ in (*module.parameters(), *module.buffers())):
            raise CaptureError(f"it calls {node.target} in one mode only{line_of(node)}")
        return module is None

    def _call(self, *bodies: Sequence[fx.Node]) -> _Section:
        name = f"by_mode_{len(self.modules)}"
        self.modules[name] = nn.Identity()  # `finished` replaces it
        self.sections.append(_Section(self._graph.call_module(name), *bodies))
        return self.sections[-1]

    def add_pair(self, ours: fx.Node, theirs: fx.Node) -> None:
        """Merge the arguments of a node that both modes have."""
        for node in (ours, theirs) if len(ours.args) != len(theirs.args) else ():  # the operator's defaults
            places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
            node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))
        self.known[theirs] = ours
        with self._graph.inserting_before(ours):
            ours.args, ours.kwargs = self._merged(ours.args, theirs.args), self._merged(ours.kwargs, theirs.kwargs)

    def _merged(self, one: Any, other: Any) -> Any:
        """The argument of both modes, or a node that has one value in train mode and another in eval mode."""
        nodes = _nodes_in((one, other))
        if repr(one) == repr(fx.map_arg(other, lambda node: self.known.get(node, "of eval mode alone"))):
            return one
        if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other) and nodes:
            return type(one)(map(self._merged, one, other))
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            return {key: self._merged(value, other[key]) for key, value in one.items()}
        if nodes:
            return self._result(one, other)
        if (key := repr((one, other))) not in self.made:
            name = f"by_mode_{len(self.modules)}"
            self.modules[name] = ByMode(one, other)
            self.made[key] = self._graph.call_module(name)
        return self.made[key]

    def _result(self, one: Any, other: Any) -> fx.Node:
        """A result of a section: of the one that computes these values, or of a new one at this place."""
        if (key := repr((one, other))) not in self.made:
            owners = {self.owners[node] for node in _nodes_in((one, other)) if node in self.owners}
            others = [node for node in _nodes_in(one) if node not in self.owners]
            others += [self.known[node] for node in _nodes_in(other) if node not in self.owners]
            section = owners.pop() if len(owners) == 1 else None
            if section is None or any(section.call < node for node in others):
                section = self._call()
            with self._graph.inserting_after(section.call):
                self.made[key] = self._graph.call_function(operator.getitem, (section.call, len(section.results)))
            self.made[key].meta = dict(one.meta) if isinstance(one, fx.Node) else {}
            section.results.append((one, other))
        return self.made[key]

    def _in_graph(self, node: fx.Node, mode: int) -> fx.Node:
        """The node of the graph with the value of a node of train mode (0) or eval mode (1)."""
        if node in self.owners:
            return self._result(None, node) if mode else self._result(node, None)
        return self.known[node] if mode else node

    def finished(self) -> dict[str, nn.Module]:
        """Create the modules of the sections. The last come first, because they ask the others for results."""
        for section in reversed(self.sections):
            results = [tuple(pair[mode] for pair in section.results) for mode in (0, 1)]
            inputs = [
                {
                    node: self._in_graph(node, mode)
                    for node in dict.fromkeys([*_nodes_in([n.all_input_nodes for n in body]), *_nodes_in(result)])
                    if node not in body
                }
                for mode, (body, result) in enumerate(zip(section.bodies, results, strict=True))
            ]
            section.call.args = tuple(dict.fromkeys([*inputs[0].values(), *inputs[1].values()]))
            graphs = [self._graph_of(section, *each) for each in zip(section.bodies, results, inputs, strict=True)]
            self.modules[str(section.call.target)] = ByMode(*graphs)
            for node in reversed(section.bodies[0]):
                self._graph.erase_node(node)
        return self.modules

    def _graph_of(
        self, section: _Section, body: Sequence[fx.Node], result: Any, inputs: dict[fx.Node, fx.Node]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        given = {node: graph.placeholder(f"value_{index}") for index, node in enumerate(section.call.args)}
        copies = {node: given[value] for node, value in inputs.items()}
        for node in body:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(result, copies.__getitem__))
        return fx.GraphModule(self._model, graph)


def _nodes_in(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(value, nodes.append)
    return nodes


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The properties of a node that must be the same in both modes."""
    return node.op, node.target, schema_of(node.target) is None and len(node.args), tuple(node.kwargs)
