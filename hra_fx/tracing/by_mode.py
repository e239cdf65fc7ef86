"""Merge the graphs of train and eval mode into one. What differs follows the mode:

    y = dropout(x, 0.1, training=True)          becomes      t = by_mode_0();  y = dropout(x, 0.1, training=t)
    if self.training: x = x.contiguous()        becomes      x = graph_of_mode_0(x)

`by_mode_0` is a module that returns one constant in train mode and another in eval mode, and `graph_of_mode_0` one that
runs one of two graphs. So `train()`, `eval()`, copies and pickles of the graph work as for any other module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from hra_fx.compat import schema_of


class ByMode(nn.Module):
    """Returns one constant in train mode and another in eval mode.

    A tensor that the forward of a model creates is also such a constant. It is not a buffer: it is not in the
    `state_dict`, and `to(dtype)` does not change it.
    """

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        """Store both constants."""
        super().__init__()
        self.in_train = in_train
        self.in_eval = in_eval

    def forward(self, device: torch.device | None = None) -> Any:
        """Return the constant of the current mode; if it is a tensor, on this device."""
        module = self.__dict__.get("followed", self)  # another module of the graph, which is not a child
        constant = self.in_train if module.training else self.in_eval
        return constant.to(device) if isinstance(constant, Tensor) else constant

    def extra_repr(self) -> str:
        """Show both constants."""
        return f"train={self.in_train!r}, eval={self.in_eval!r}"


class ModesDifferError(Exception):
    """The graphs of both modes have different nodes."""

    def __init__(self, *nodes: fx.Node) -> None:
        """Store the first pair of nodes that differs, from train and eval mode."""
        super().__init__()
        self.nodes = nodes


#: Creates a module that runs one of two graphs with the same inputs.
MakeModule: TypeAlias = Callable[[fx.Graph, fx.Graph], nn.Module]


def merge_modes(in_train: fx.Graph, in_eval: fx.Graph, make: MakeModule | None = None) -> dict[str, nn.Module]:
    """Change the graph of train mode into a graph for both modes, in place. Returns the modules to add to it.

    `make` creates the modules for what only one mode runs. Without it, a `ModesDifferError` is raised.
    """
    return _Merge(in_train, in_eval, make).run()


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The properties of a node that must be the same in both modes."""
    return node.op, node.target, schema_of(node.target) is None and len(node.args), tuple(node.kwargs)


class _Part:
    """A difference between the modes: a call of a module that runs one of two graphs.

    Attributes:
        call: the node of the merged graph.
        nodes: those of train mode, and those of eval mode; none if only an argument of a common node differs.
        results: what the call returns: an argument of each mode, and the node of the merged graph that has its value.
    """

    def __init__(self, call: fx.Node, nodes: tuple[list[fx.Node], ...]) -> None:
        self.call = call
        self.nodes = nodes
        self.results: list[tuple[Any, Any, fx.Node]] = []

    def reads(self, mode: int) -> Iterator[fx.Node]:
        """The nodes from which the graph of a mode reads, and which are not in it."""
        found = [read for node in self.nodes[mode] for read in node.all_input_nodes]
        fx.map_arg([result[mode] for result in self.results], found.append)
        return (node for node in found if node not in self.nodes[mode])


class _Merge:
    """Merges two graphs: first the nodes that both modes have, and then what differs, in parts.

    Attributes:
        _both: the nodes of train mode, and those of eval mode.
        _values: node of either graph -> node of the merged graph that has its value.
        _parts: node of either graph -> the part that it is in.
        _started: all parts, also those without nodes.
    """

    def __init__(self, in_train: fx.Graph, in_eval: fx.Graph, make: MakeModule | None) -> None:
        self._graph, self._make = in_train, make
        self._modules: dict[str, nn.Module] = {}
        self._both = list(in_train.nodes), list(in_eval.nodes)
        self._values: dict[fx.Node, fx.Node] = {}
        self._parts: dict[fx.Node, _Part] = {}
        self._started: list[_Part] = []

    def run(self) -> dict[str, nn.Module]:
        """Merge all nodes."""
        one, other = (list(map(_form, nodes)) for nodes in self._both)
        matcher = SequenceMatcher(None, one, other, autojunk=False)  # the last nodes are equal: they are outputs
        for tag, *(start, end, first, last) in matcher.get_opcodes():
            ours, theirs = self._both[0][start:end], self._both[1][first:last]
            if tag == "equal":
                for self._pair in zip(ours, theirs, strict=True):
                    self._merge_pair(*self._pair)
            elif self._make is None:
                raise ModesDifferError(self._both[0][start], self._both[1][first])
            else:
                with self._graph.inserting_before(self._both[0][end]):
                    self._separate(ours, theirs)
        for part in sorted(self._started, key=lambda part: part.call, reverse=True):  # one may read from those before
            self._finish(part)
        for node in reversed(self._both[0]):
            if node in self._parts:
                self._graph.erase_node(node)
        return self._modules

    # --- nodes that both modes have -----------------------------------------------------------------------------------

    def _merge_pair(self, one: fx.Node, other: fx.Node) -> None:
        self._values |= {one: one, other: one}
        for node in (one, other) if len(one.args) != len(other.args) else ():  # the operator's defaults
            places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
            node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))
        with self._graph.inserting_before(one):
            args = tuple(map(self._merge, one.args, other.args))
            kwargs = {key: self._merge(value, other.kwargs[key]) for key, value in one.kwargs.items()}
        one.args, one.kwargs = args, kwargs

    def _merge(self, ours: Any, theirs: Any) -> Any:
        """Merge an argument: a node, a constant, or the call of a module; containers and slices item by item."""
        others: list[Any] = []
        if map_aggregate(ours, lambda _: None) != map_aggregate(theirs, others.append):
            return self._choice(ours, theirs)
        rest = iter(others)
        return map_aggregate(ours, lambda value: self._item(value, next(rest)))

    def _item(self, one: Any, other: Any) -> Any:
        if isinstance(other, fx.Node) and self._values.get(other) is self._values.get(one, one):
            return self._values[other]
        is_same = not isinstance(one, fx.Node) and type(one) is type(other) and repr(one) == repr(other)
        return one if is_same else self._choice(one, other)

    def _choice(self, ours: Any, theirs: Any) -> fx.Node:
        """A node that has the value of one argument in train mode and of another in eval mode."""
        found: list[fx.Node] = []
        fx.map_arg((ours, theirs), found.append)
        if not found:
            name = f"by_mode_{len(self._modules)}"
            self._modules[name] = ByMode(ours, theirs)
            return self._graph.call_module(name)
        if self._make is None:
            raise ModesDifferError(*self._pair)
        part = max(
            (self._parts[node] for node in found if node in self._parts), key=lambda part: part.call, default=None
        )
        if part is None or any(node in self._values and self._values[node] > part.call for node in found):
            part = self._start([], [])
        return self._result(part, ours, theirs)

    # --- what differs -------------------------------------------------------------------------------------------------

    def _separate(self, ours: list[fx.Node], theirs: list[fx.Node]) -> None:
        """Start a part for nodes that only one mode has, except for reads of the model's tensors."""
        for node in (*ours, *theirs):
            if node.op == "get_attr":
                self._values[node] = node if node.graph is self._graph else self._graph.node_copy(node)
        nodes = [[node for node in each if node.op != "get_attr"] for each in (ours, theirs)]
        if any(nodes):
            part = self._start(*nodes)
            self._parts |= {node: part for each in nodes for node in each}
            stacks = [list(node.meta.get("nn_module_stack", {}).items()) for each in nodes for node in each]
            common = takewhile(lambda each: len(set(each)) == 1, zip(*stacks, strict=False))
            part.call.meta["nn_module_stack"] = dict(each[0] for each in common)

    def _start(self, *nodes: list[fx.Node]) -> _Part:
        """Create a part at the current place of the graph."""
        part = _Part(self._graph.call_module(f"graph_of_mode_{len(self._started)}"), nodes)
        self._started.append(part)
        return part

    def _result(self, part: _Part, ours: Any, theirs: Any) -> fx.Node:
        """The node that has a result of a part."""
        for one, other, node in part.results:
            if one is ours and other is theirs:
                return node
        with self._graph.inserting_after(part.call):
            node = self._graph.call_function(operator.getitem, (part.call, len(part.results)))
        for each in (theirs, ours):
            if isinstance(each, fx.Node) and "val" in each.meta:
                node.meta["val"] = each.meta["val"]
        part.results.append((ours, theirs, node))
        return node

    def _value(self, node: fx.Node) -> fx.Node:
        """The node of the merged graph that has the value of a node in its mode."""
        if node in self._values:
            return self._values[node]
        pair = (node, None) if node.graph is self._graph else (None, node)
        return self._result(self._parts[node], *pair)

    def _finish(self, part: _Part) -> None:
        """Create the module of a part."""
        inputs = dict.fromkeys(self._value(node) for mode in (0, 1) for node in part.reads(mode))
        part.call.args = tuple(inputs)
        assert self._make is not None
        self._modules[str(part.call.target)] = self._make(*(self._inner(part, mode, inputs) for mode in (0, 1)))
        if len(part.results) == 1:
            node = part.results[0][-1]
            part.call.meta |= node.meta
            node.replace_all_uses_with(part.call)
            self._graph.erase_node(node)

    def _inner(self, part: _Part, mode: int, inputs: Iterable[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        places = {value: graph.placeholder(value.name) for value in inputs}
        copies: dict[fx.Node, fx.Node] = {}

        def find(node: fx.Node) -> fx.Node:
            return copies[node] if node in copies else places[self._value(node)]

        for node in part.nodes[mode]:
            copies[node] = graph.node_copy(node, find)
        found = [fx.map_arg(result[mode], find) for result in part.results]
        graph.output(found[0] if len(found) == 1 else tuple(found))
        return graph
