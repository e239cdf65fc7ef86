"""One GraphModule for train and eval mode, from a capture in each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from hra_fx.compat import OpOverload, schema_of
from hra_fx.errors import CaptureError
from hra_fx.tracing.by_mode import ByMode, ModesDifferError, merge_modes
from hra_fx.tracing.canonical import CHECKS, Canonical, module_path
from hra_fx.tracing.graph_module import captured_module
from hra_fx.tracing.inputs import InputChecks
from hra_fx.tracing.trace import Traced
from hra_fx.tracing.tracer import UnpicklingTracer

_CONTIGUOUS = torch.ops.aten.contiguous.default
#: The name of the module that runs the graph of the current mode, where the modes have different nodes.
BY_MODE = "graph_of_mode"


class GraphOfMode(nn.Module):
    """Runs one graph in train mode and another in eval mode, over the same layers.

    The graphs are not registered as children, because the model already has their layers under the same names.
    """

    def __init__(self, in_train: fx.GraphModule, in_eval: fx.GraphModule) -> None:
        """Store both graphs."""
        super().__init__()
        vars(self).update(in_train=in_train, in_eval=in_eval)

    def forward(self, *args: Any) -> Any:
        """Run the graph of the current mode."""
        graph: Any = self.in_train if self.training else self.in_eval
        return graph(*args)


def in_both_modes(
    model: nn.Module, in_train: Canonical, in_eval: Canonical, checks: InputChecks, odd: str | None = None
) -> fx.GraphModule:
    """A GraphModule over the modules and tensors of a model that is valid in both modes.

    Args:
        model: the model.
        in_train, in_eval: the captures of its modes.
        checks: the child that checks the inputs.
        odd: the path of a part that is in another mode than the model.

    Raises:
        CaptureError: the modes run different operators, and `odd` would be in the mode of the model.
    """
    try:
        if not _same_constants(in_train.constants, in_eval.constants):
            raise ModesDifferError
        graph, other = (copy.deepcopy(part.graph) for part in (in_train, in_eval))
        _drop_single_copies(graph, other)
        _give_defaults(graph, other)
        modules = merge_modes(graph, other)
    except ModesDifferError:
        if odd is not None:
            raise CaptureError(
                f"{odd} is in another mode than the model. Call train() or eval() on the whole model"
            ) from None
        return _of_two_graphs(model, in_train, in_eval, checks)
    made = captured_module(model, {CHECKS: checks, **in_train.constants}, Traced(graph, modules))
    for call in graph.find_nodes(op="call_module"):
        if call.target in modules:
            _set_place(modules[str(call.target)], made, module_path(next(iter(call.users))))
    return made


def _set_place(constant: ByMode, made: fx.GraphModule, path: str) -> None:
    """Let a constant follow the mode of the module that reads it, or of the innermost one around it that is left."""
    while path:
        with suppress(AttributeError):
            constant.follow(made.get_submodule(path))
            return
        path = path.rpartition(".")[0]


def _same_constants(ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]) -> bool:
    def same(one: nn.Module, other: nn.Module) -> bool:
        if isinstance(one, ByMode) and isinstance(other, ByMode):
            return torch.equal(one.in_train, other.in_train)
        return isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule) and one.code == other.code

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
            single.replace_all_uses_with(single.args[0])
            single.graph.erase_node(single)
        else:
            one, other = one.next, other.next


def _give_defaults(ours: fx.Graph, theirs: fx.Graph) -> None:
    """Write out the default arguments of operators that only one of the graphs gives."""
    for one, other in zip(ours.nodes, theirs.nodes, strict=False):
        if one.target is other.target and isinstance(one.target, OpOverload) and len(one.args) != len(other.args):
            for node in (one, other):
                places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
                node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))


def _of_two_graphs(model: nn.Module, in_train: Canonical, in_eval: Canonical, checks: InputChecks) -> fx.GraphModule:
    """A graph of one call, of the module that has both graphs.

    It reads the tensors of the model itself and passes them on, and has all modules that the graphs call, so that
    changes of dtype, device and mode reach them.
    """
    captures = {"train": in_train, "eval": in_eval}
    constants: dict[str, nn.Module] = {CHECKS: checks}
    for mode, part in captures.items():
        for node in part.graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target in part.constants:
                node.target = f"{node.target}_{mode}"
        constants |= {f"{name}_{mode}": value for name, value in part.constants.items()}
    names = sorted({name for part in captures.values() for name in _own_tensors(part.graph, model)})
    for part in captures.values():
        _pass_in(part.graph, names)
    inner = [captured_module(model, constants, Traced(part.graph, {})) for part in captures.values()]
    graph = fx.Graph(tracer_cls=UnpicklingTracer)
    places = [graph.placeholder(str(node.target)) for node in in_train.graph.find_nodes(op="placeholder")]
    del places[len(places) - len(names) :]
    for node in graph.find_nodes(op="placeholder")[len(places) :]:
        graph.erase_node(node)
    reads = [graph.get_attr(name) for name in names]
    graph.output(graph.call_module(BY_MODE, (*places, *reads)))
    made = captured_module(model, {BY_MODE: GraphOfMode(*inner), **constants}, Traced(graph, {}))
    present = {path for path, _ in made.named_modules(remove_duplicate=False)}
    for module in inner:
        for call in module.graph.find_nodes(op="call_module"):
            if call.target not in present:
                made.add_submodule(str(call.target), module.get_submodule(str(call.target)))
    return made


def _own_tensors(graph: fx.Graph, model: nn.Module) -> Iterator[str]:
    """The tensors of the model itself that a graph reads."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if "." not in name and isinstance(getattr(model, name, None), torch.Tensor):
            yield name


def _pass_in(graph: fx.Graph, names: Sequence[str]) -> None:
    """Make tensors that a graph reads its last inputs."""
    last = graph.find_nodes(op="placeholder")[-1]
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        for node in graph.find_nodes(op="get_attr", target=name):
            node.replace_all_uses_with(last)
            graph.erase_node(node)
