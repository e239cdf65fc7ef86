"""Merge the graphs of train and eval mode, which may differ in constants, into one:

    y = dropout(x, 0.1, training=True)          becomes      t = by_mode_0();  y = dropout(x, 0.1, training=t)

`by_mode_0` is a module that returns one constant in train mode and another in eval mode. So `train()`, `eval()`, copies
and pickles of the graph work as for any other module. `aten.contiguous` never changes a value: both modes run it, even
if only one of them needs it. All other nodes must be the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from hra_fx.compat import schema_of
from hra_fx.errors import CaptureError
from hra_fx.passes.nodes import line_of, module_path

_CONTIGUOUS = torch.ops.aten.contiguous.default


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


def merge_modes(in_train: fx.Graph, in_eval: fx.Graph) -> dict[str, nn.Module]:
    """Change the graph of train mode into a graph for both modes, in place. Returns the modules to add to it."""
    return _Merge(in_train).run(in_eval)


def _difference(*pair: fx.Node) -> CaptureError:
    """The error for a pair of nodes that differs, from train and eval mode."""
    places = [line_of(node) or f" in {module_path(node) or 'its forward'}" for node in pair]
    return CaptureError(f"it runs different operations in train mode{places[0]} and in eval mode{places[1]}")


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The properties of a node that must be the same in both modes."""
    return node.op, node.target, schema_of(node.target) is None and len(node.args), tuple(node.kwargs)


def _is_contiguous(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is _CONTIGUOUS


def _source(node: Any) -> Any:
    """The node itself, or the one that it makes contiguous."""
    while _is_contiguous(node):
        node = node.args[0]
    return node


class _Merge:
    """Merges two graphs node by node.

    Attributes:
        _values: node of eval mode -> node of train mode with the same value.
        _copies: `contiguous` of eval mode -> its copy in train mode.
        _pair: the nodes that are being merged.
    """

    _pair: tuple[fx.Node, fx.Node]

    def __init__(self, in_train: fx.Graph) -> None:
        self._graph = in_train
        self._modules: dict[str, nn.Module] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}

    def run(self, in_eval: fx.Graph) -> dict[str, nn.Module]:
        """Merge all nodes."""
        ours, theirs = ([x for x in graph.nodes if not _is_contiguous(x)] for graph in (self._graph, in_eval))
        for self._pair in zip(ours, theirs, strict=False):  # the last nodes are the outputs
            one, other = self._pair
            if _form(one) != _form(other):
                raise _difference(one, other)
            self._values[other] = one
            self._merge_arguments(one, other)
        return self._modules

    def _merge_arguments(self, one: fx.Node, other: fx.Node) -> None:
        for node in (one, other) if len(one.args) != len(other.args) else ():  # the operator's defaults
            places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
            node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))
        with self._graph.inserting_before(one):
            args = tuple(map(self._merge, one.args, other.args))
            kwargs = {key: self._merge(value, other.kwargs[key]) for key, value in one.kwargs.items()}
        one.args, one.kwargs = args, kwargs

    def _merge(self, ours: Any, theirs: Any) -> Any:
        """Merge an argument: a node or a constant; containers and slices item by item."""
        others: list[Any] = []
        if map_aggregate(ours, lambda _: None) != map_aggregate(theirs, others.append):
            return self._choice(ours, theirs)
        rest = iter(others)
        return map_aggregate(ours, lambda value: self._item(value, next(rest)))

    def _item(self, one: Any, other: Any) -> Any:
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if self._values.get(_source(other)) is not _source(one):
                raise _difference(*self._pair)
            if not _is_contiguous(other) or _is_contiguous(one):
                return one
            if other not in self._copies:
                with self._graph.inserting_after(one):
                    self._copies[other] = self._graph.node_copy(other, lambda _: one)
            return self._copies[other]
        return one if type(one) is type(other) and repr(one) == repr(other) else self._choice(one, other)

    def _choice(self, ours: Any, theirs: Any) -> fx.Node:
        """A node that has one constant in train mode and another in eval mode."""
        nodes: list[fx.Node] = []
        fx.map_arg((ours, theirs), nodes.append)
        if nodes:
            raise _difference(*self._pair)
        name = f"by_mode_{len(self._modules)}"
        self._modules[name] = ByMode(ours, theirs)
        return self._graph.call_module(name)
