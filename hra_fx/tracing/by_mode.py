"""Merge the graphs of train and eval mode into one, if they differ only in constants.

    y = dropout(x, 0.1, training=True)      becomes      t = by_mode_0();  y = dropout(x, 0.1, training=t)

`by_mode_0` is a module that returns one constant in train mode and another in eval mode, so `train()`, `eval()`, copies
and pickles of the graph work as for any other module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate


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


def merge_modes(in_train: fx.Graph, in_eval: fx.Graph) -> dict[str, ByMode]:
    """Change the graph of train mode into a graph for both modes, in place. Returns the modules to add to it."""
    modules: dict[str, ByMode] = {}
    twins: dict[fx.Node, fx.Node] = {}
    ours, theirs = list(in_train.nodes), list(in_eval.nodes)
    for one, other in zip(ours, theirs, strict=False):
        twins[other] = one
        if _form(one) != _form(other):
            raise ModesDifferError(one, other)
        with in_train.inserting_before(one):
            merge = _Merge((one, other), twins, modules)
            args = tuple(map(merge, one.args, other.args))
            kwargs = {key: merge(value, other.kwargs[key]) for key, value in one.kwargs.items()}
        one.args, one.kwargs = args, kwargs
    if len(ours) != len(theirs):
        raise ModesDifferError(ours[-1], theirs[-1])
    return modules


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The properties of a node that must be the same in both modes."""
    return node.op, node.target, len(node.args), node.kwargs.keys()


class _Merge:
    """Merges the arguments of two nodes."""

    def __init__(
        self, nodes: tuple[fx.Node, fx.Node], twins: dict[fx.Node, fx.Node], modules: dict[str, ByMode]
    ) -> None:
        self._nodes = nodes
        self._twins = twins
        self._modules = modules

    def __call__(self, ours: Any, theirs: Any) -> Any:
        """Merge an argument: a node, a constant, or the call of a `ByMode`; containers and slices item by item."""
        others: list[Any] = []
        if map_aggregate(ours, lambda _: None) != map_aggregate(theirs, others.append):
            return self._constant(ours, theirs)
        rest = iter(others)
        return map_aggregate(ours, lambda value: self._item(value, next(rest)))

    def _item(self, one: Any, other: Any) -> Any:
        if isinstance(other, fx.Node) and self._twins.get(other) is one:
            return one
        is_same = not isinstance(one, fx.Node) and type(one) is type(other) and repr(one) == repr(other)
        return one if is_same else self._constant(one, other)

    def _constant(self, ours: Any, theirs: Any) -> fx.Node:
        found: list[fx.Node] = []
        fx.map_arg((ours, theirs), found.append)
        if found:
            raise ModesDifferError(*self._nodes)
        name = f"by_mode_{len(self._modules)}"
        self._modules[name] = ByMode(ours, theirs)
        return self._nodes[0].graph.call_module(name)
