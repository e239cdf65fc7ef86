"""Merge the graphs of train and eval mode, which may differ in constants, into one:

    y = dropout(x, 0.1, training=True)          becomes      t = by_mode_0();  y = dropout(x, 0.1, training=t)

`by_mode_0` is a module that returns one constant in train mode and another in eval mode. So `train()`, `eval()`, copies
and pickles of the graph work as for any other module. All nodes must be the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

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
    modules: dict[str, nn.Module] = {}
    known: dict[fx.Node, fx.Node] = {}  # node of eval mode -> node of train mode with the same value
    choices: dict[str, fx.Node] = {}  # text of a pair of constants -> its node

    def merged(one: Any, other: Any) -> Any:
        """The argument of both modes, or a node with one constant in train mode and another in eval mode."""
        nodes: list[fx.Node] = []
        fx.map_arg((one, other), nodes.append)
        if repr(one) == repr(fx.map_arg(other, lambda node: known.get(node, node))):
            return one
        if nodes:
            raise _difference(ours, theirs)
        key = repr((one, other))
        if key not in choices:
            name = f"by_mode_{len(modules)}"
            modules[name] = ByMode(one, other)
            choices[key] = in_train.call_module(name)
        return choices[key]

    for ours, theirs in zip(in_train.nodes, in_eval.nodes, strict=False):  # the last nodes are the outputs
        if _form(ours) != _form(theirs):
            raise _difference(ours, theirs)
        for node in (ours, theirs) if len(ours.args) != len(theirs.args) else ():  # the operator's defaults
            places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
            node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))
        with in_train.inserting_before(ours):
            args = tuple(map(merged, ours.args, theirs.args))
            kwargs = {key: merged(value, theirs.kwargs[key]) for key, value in ours.kwargs.items()}
        ours.args, ours.kwargs = args, kwargs
        known[theirs] = ours
    return modules


def _form(node: fx.Node) -> tuple[Any, ...]:
    """The properties of a node that must be the same in both modes."""
    return node.op, node.target, schema_of(node.target) is None and len(node.args), tuple(node.kwargs)


def _difference(*nodes: fx.Node) -> CaptureError:
    places = [line_of(node) or f" in {module_path(node) or 'its forward'}" for node in nodes]
    return CaptureError(f"it runs different operations in train mode{places[0]} and in eval mode{places[1]}")
