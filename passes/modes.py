"""Merge the graphs of train and eval mode, which may differ in constants, into one:

    y = dropout(x, 0.1, training=True)          becomes      t = by_mode_0();  y = dropout(x, 0.1, training=t)

`by_mode_0` is a module that returns one constant in train mode and another in eval mode. So `train()`, `eval()`, copies
and pickles of the graph work as for any other module. All nodes must be the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from hra_fx.compat import schema_of
from hra_fx.errors import CaptureError
from hra_fx.passes.nodes import line_of, module_path


class ByMode(nn.Module):
    """Returns one constant in train mode and another in eval mode.

    A tensor that the forward of a model creates is also such a constant. It is not a buffer: it is not in the
    `state_dict`, and `to(dtype)` does not change it.

    Attributes:
        parts: modules of the graph that it does not call, so that they do not have a mode of their own.
    """

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        """Store both constants."""
        super().__init__()
        self.in_train = in_train
        self.in_eval = in_eval
        self.parts: tuple[nn.Module, ...] = ()

    def forward(self, device: torch.device | None = None) -> Any:
        """Return the constant of the current mode; if it is a tensor, on this device."""
        if any(part.training is not self.training for part in self.parts):
            raise AssertionError(
                "parts of the graph have different modes, and it is right only if all have the same. Call "
                "graph.train() or graph.eval(), or use the original model."
            )
        constant = self.in_train if self.training else self.in_eval
        return constant.to(device) if isinstance(constant, Tensor) else constant

    def extra_repr(self) -> str:
        """Show both constants."""
        return f"train={self.in_train!r}, eval={self.in_eval!r}"


def merge_modes(in_train: fx.Graph, in_eval: fx.Graph) -> dict[str, nn.Module]:
    """Change the graph of train mode into a graph for both modes, in place. Returns the modules to add to it."""
    merge = _Merge(in_train)
    for pair in zip(in_train.nodes, in_eval.nodes, strict=False):  # the last nodes are the outputs
        merge.add(*pair)
    return merge.modules


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The properties of a node that must be the same in both modes."""
    return node.op, node.target, schema_of(node.target) is None and len(node.args), tuple(node.kwargs)


class _Merge:
    """Merges two graphs node by node.

    Attributes:
        modules: name -> module, for each pair of constants.
        _values: node of eval mode -> node of train mode with the same value.
        _choices: text of a pair of constants -> its node.
        _pair: the nodes that are being merged.
    """

    _pair: tuple[fx.Node, fx.Node]

    def __init__(self, in_train: fx.Graph) -> None:
        self._graph = in_train
        self.modules: dict[str, nn.Module] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        self._choices: dict[str, fx.Node] = {}

    def add(self, one: fx.Node, other: fx.Node) -> None:
        """Merge the next node of both graphs."""
        self._pair = one, other
        if _form(one) != _form(other):
            raise self._difference()
        for node in (one, other) if len(one.args) != len(other.args) else ():  # the operator's defaults
            places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
            node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))
        with self._graph.inserting_before(one):
            args = tuple(map(self._merge, one.args, other.args))
            kwargs = {key: self._merge(value, other.kwargs[key]) for key, value in one.kwargs.items()}
        one.args, one.kwargs = args, kwargs
        self._values[other] = one

    def _merge(self, ours: Any, theirs: Any) -> Any:
        """Merge an argument: a node or a constant; containers and slices item by item."""
        others: list[Any] = []
        if map_aggregate(ours, lambda _: None) != map_aggregate(theirs, others.append):
            return self._choice(ours, theirs)
        rest = iter(others)
        return map_aggregate(ours, lambda value: self._item(value, next(rest)))

    def _item(self, one: Any, other: Any) -> Any:
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if self._values.get(other) is not one:
                raise self._difference()
            return one
        return one if type(one) is type(other) and repr(one) == repr(other) else self._choice(one, other)

    def _choice(self, ours: Any, theirs: Any) -> fx.Node:
        """A node that has one constant in train mode and another in eval mode."""
        nodes: list[fx.Node] = []
        fx.map_arg((ours, theirs), nodes.append)
        if nodes:
            raise self._difference()
        key = repr((ours, theirs))
        if key not in self._choices:
            name = f"by_mode_{len(self.modules)}"
            self.modules[name] = ByMode(ours, theirs)
            self._choices[key] = self._graph.call_module(name)
        return self._choices[key]

    def _difference(self) -> CaptureError:
        places = [line_of(node) or f" in {module_path(node) or 'its forward'}" for node in self._pair]
        return CaptureError(f"it runs different operations in train mode{places[0]} and in eval mode{places[1]}")
