"""One GraphModule for train and eval mode, from a capture in each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from hra_fx.compat import OpOverload
from hra_fx.tracing.by_mode import ModesDifferError, merge_modes
from hra_fx.tracing.canonical import CHECKS, Canonical
from hra_fx.tracing.input_checks import InputChecks
from hra_fx.tracing.nested_graphs import captured_module
from hra_fx.tracing.trace import Traced
from hra_fx.tracing.tracer import UnpicklingTracer

_CONTIGUOUS = torch.ops.aten.contiguous.default
#: The name of the module that runs the graph of the current mode, where the modes have different nodes.
BY_MODE = "graph_of_mode"


class GraphOfMode(nn.Module):
    """Runs one graph in train mode and another in eval mode, over the same layers.

    The graphs are no children: the model has their layers already, under the same names.
    """

    def __init__(self, in_train: fx.GraphModule, in_eval: fx.GraphModule) -> None:
        """Store both graphs."""
        super().__init__()
        vars(self).update(in_train=in_train, in_eval=in_eval)

    def forward(self, *args: Any) -> Any:
        """Run the graph of the current mode."""
        graph: Any = self.in_train if self.training else self.in_eval
        return graph(*args)


def in_both_modes(model: nn.Module, in_train: Canonical, in_eval: Canonical) -> fx.GraphModule:
    """A GraphModule over the modules and tensors of a model that is valid in both modes.

    Args:
        model: the model.
        in_train, in_eval: the captures of its modes.
    """
    checks = InputChecks(in_train.conditions, in_eval.conditions)
    try:
        if not _same_constants(in_train.constants, in_eval.constants):
            raise ModesDifferError
        graph, other = (copy.deepcopy(part.graph) for part in (in_train, in_eval))
        _drop_single_copies(graph, other)
        _give_defaults(graph, other)
        modules = merge_modes(graph, other)
    except ModesDifferError:
        return _of_two_graphs(model, in_train, in_eval, checks)
    return captured_module(model, {CHECKS: checks, **in_train.constants}, Traced(graph, modules))


def _same_constants(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    def same(one: Any, other: Any) -> bool:
        if isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule):
            return one.code == other.code
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)

    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


def _drop_single_copies(ours: fx.Graph, theirs: fx.Graph) -> None:
    """Remove each `contiguous` that only one of the graphs has: the other mode shows that it is not needed."""
    one, other = next(iter(ours.nodes)), next(iter(theirs.nodes))
    while one.op != "root" and other.op != "root":
        if one.target is not other.target and _CONTIGUOUS in (one.target, other.target):
            single = one if one.target is _CONTIGUOUS else other
            if single is one:
                one = one.next
            else:
                other = other.next
            single.replace_all_uses_with(single.args[0])  # type: ignore[arg-type]  # the tensor
            single.graph.erase_node(single)
        else:
            one, other = one.next, other.next


def _give_defaults(ours: fx.Graph, theirs: fx.Graph) -> None:
    """Write out the default arguments of operators that only one of the graphs gives."""
    for one, other in zip(ours.nodes, theirs.nodes, strict=False):
        if one.target is other.target and isinstance(one.target, OpOverload) and len(one.args) != len(other.args):
            for node in (one, other):
                places = [argument for argument in node.target._schema.arguments if not argument.kwarg_only]
                node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))


def _of_two_graphs(model: nn.Module, in_train: Canonical, in_eval: Canonical, checks: InputChecks) -> fx.GraphModule:
    """A graph of one call, of the module that has both graphs."""
    parts = [
        captured_module(model, {CHECKS: checks, **part.constants}, Traced(part.graph, {}))
        for part in (in_train, in_eval)
    ]
    graph = fx.Graph(tracer_cls=UnpicklingTracer)
    places = [graph.placeholder(str(node.target)) for node in in_train.graph.find_nodes(op="placeholder")]
    graph.output(graph.call_module(BY_MODE, tuple(places)))
    return captured_module(model, {BY_MODE: GraphOfMode(*parts)}, Traced(graph, {}))
