"""Capture an example call of a model with `torch.export`, as one GraphModule that calls the model's layers.

The graph is valid in train and in eval mode, because it is created from one capture in each mode.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import OpOverload, has_backward_hooks, require, schema_of
from hra_fx.errors import CaptureError, HRAWarning
from hra_fx.layers.target import find_kind
from hra_fx.model.example_inputs import Call, preserve_rng_state
from hra_fx.model.graph_module import GraphOfMode
from hra_fx.tracing.by_mode import ByMode, ModesDifferError, merge_modes
from hra_fx.tracing.compare import compare, compare_call
from hra_fx.tracing.exported import LOCK, depends_on_mode, examples_with_shapes, export_call, is_leaf, without_caches
from hra_fx.tracing.graph_module import CHECKS, Canonical, InBlockError, canonical, captured_module
from hra_fx.tracing.inputs import Condition, InputChecks, size_conditions

#: The name of the module that runs the graph of the current mode, if the modes have different nodes.
BY_MODE = "graph_of_mode"


def capture_layers(
    model: nn.Module, call: Call, dynamic_shapes: Any = None, *, is_trained: bool = True
) -> fx.GraphModule:
    """Capture one call of a model. The graph is valid for other sizes and for both modes, and checks its inputs.

    By default, all sizes that the model allows may change; for images, only the batch size. `is_trained` compares
    gradients too. The graph calls the layers that can be adapted, and modules without children that map one tensor to
    one tensor. It has operators for everything else. An output that `torch.export` does not support, such as a cache,
    is `None`. Keyword arguments become inputs in the order of the model's signature.
    """
    call = _prepared(model, call)
    for path, part in model.named_modules() if is_trained else ():
        if is_leaf(part):
            continue
        if has_backward_hooks(part):
            raise CaptureError(f"backward hooks are registered for {path or 'it'}, which a graph drops. Remove them")
        if getattr(part, "gradient_checkpointing", False) is True:
            raise CaptureError(f"{path or 'it'} checkpoints its activations, which a graph drops. Disable that first")
    with LOCK, preserve_rng_state(), without_caches(model), torch.inference_mode(False):
        tries = examples_with_shapes(model, call) if dynamic_shapes is None else [(call, dynamic_shapes)]
        for example, shapes in tries:
            try:
                return _captured(model, example, shapes, call, is_trained=is_trained)
            except CaptureError as error:
                failure = error
        raise failure


def capture_in_eval(model: nn.Module, call: Call) -> fx.GraphModule:
    """Capture one call of a model for a picture, much faster: the graph is valid only for this call in eval mode."""
    call = _prepared(model, call)
    with LOCK, preserve_rng_state(), without_caches(model), torch.inference_mode(False):
        only = _in_modes(model, call, None, [False])[0]
        made = captured_module(model, {CHECKS: InputChecks([], []), **only.constants}, only.graph)
        compare_call(model, made, call)
        return made


def _prepared(model: nn.Module, call: Call) -> Call:
    """Check the model, and sort the keyword arguments of a call."""
    require("a graph captured by torch.export")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device. Load the weights first")
    order = [*inspect.signature(model.forward).parameters, *call[1]]
    return call[0], dict(sorted(call[1].items(), key=lambda item: order.index(item[0])))


def _captured(model: nn.Module, example: Call, shapes: Any, call: Call, *, is_trained: bool) -> fx.GraphModule:
    """Capture the graph of an example, and compare it with the model for this example and a call."""
    modes = _in_modes(model, example, shapes, (True, False))
    checks = InputChecks(modes[0].conditions, modes[1].conditions)
    made = _in_both_modes(model, modes[0], modes[1], checks)
    sizes = modes[0].sizes
    limits = compare(model, made, example, sizes, with_gradients=is_trained)
    if example is not call:
        compare(model, made, call, (), with_gradients=is_trained)
    checks.add(size_conditions(modes[0].names, sizes, limits.not_one))
    if not limits.under_autocast:
        checks.add([Condition(*["not torch.is_autocast_enabled('cpu') and not torch.is_autocast_enabled('cuda')"] * 2)])
    _warn_of_unread(model, made.graph, call[1])
    return made


def _warn_of_unread(model: nn.Module, graph: fx.Graph, kwargs: Mapping[str, Any]) -> None:
    """Warn of tensors that only `**kwargs` of the model accepts, and that its graph only checks."""
    known = inspect.signature(model.forward).parameters
    for node in graph.find_nodes(op="placeholder"):
        is_unknown = node.target not in known and isinstance(kwargs.get(node.target), Tensor)
        if is_unknown and all(user.target == CHECKS for user in node.users):
            hint = "".join(f" Did you mean {name!r}?" for name in difflib.get_close_matches(node.target, known, 1))
            text = f"`example_inputs`: {type(model).__name__} does not read {node.target!r}.{hint}"
            warnings.warn(text, HRAWarning, stacklevel=2)


def _in_modes(model: nn.Module, example: Call, shapes: Any, trained: Iterable[bool]) -> list[Canonical]:
    """Capture train or eval mode, or both.

    Leaves in a block with a separate graph, which could not call them, are inlined.
    """
    inlined: set[str] = set()
    while True:
        modes = []
        try:
            for training in trained:
                program = export_call(model, example, shapes, training=training, inlined=inlined)
                modes.append(canonical(program, model))
            return modes
        except InBlockError as error:
            inside = {path: model.get_submodule(path) for path in error.paths}
            if any(depends_on_mode(part) or find_kind(part) for part in inside.values()):
                raise
            inlined |= inside.keys()


# --- both modes -------------------------------------------------------------------------------------------------------


def _in_both_modes(model: nn.Module, in_train: Canonical, in_eval: Canonical, checks: InputChecks) -> fx.GraphModule:
    """Create a GraphModule with the modules and tensors of a model that is valid in both modes."""
    try:
        if not _same_constants(in_train.constants, in_eval.constants):
            raise ModesDifferError
        graph, other = (copy.deepcopy(part.graph) for part in (in_train, in_eval))
        _give_defaults(graph, other)
        modules = merge_modes(graph, other)
    except ModesDifferError:
        return _of_two_graphs(model, in_train, in_eval, checks)
    return captured_module(model, {CHECKS: checks, **in_train.constants, **modules}, graph)


def _same_constants(ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]) -> bool:
    def same(one: nn.Module, other: nn.Module) -> bool:
        if isinstance(one, ByMode) and isinstance(other, ByMode):
            return torch.equal(one.in_train, other.in_train)
        return isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule) and one.code == other.code

    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


def _give_defaults(ours: fx.Graph, theirs: fx.Graph) -> None:
    """Add the default arguments of operators that only one of the graphs passes."""
    for one, other in zip(ours.nodes, theirs.nodes, strict=False):
        if one.target is other.target and isinstance(one.target, OpOverload) and len(one.args) != len(other.args):
            for node in (one, other):
                places = [argument for argument in schema_of(node.target).arguments if not argument.kwarg_only]
                node.args = (*node.args, *(argument.default_value for argument in places[len(node.args) :]))


def _of_two_graphs(model: nn.Module, in_train: Canonical, in_eval: Canonical, checks: InputChecks) -> fx.GraphModule:
    """Create a graph with one call, to a module that has the graphs of both modes.

    The graph reads the model's own tensors and passes them to that module. It has all modules that the two graphs call,
    so that changes of dtype, device and mode apply to them.
    """
    captures = {"train": in_train, "eval": in_eval}
    constants: dict[str, nn.Module] = {CHECKS: checks}
    for mode, part in captures.items():
        for node in part.graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target in part.constants:
                node.target = f"{node.target}_{mode}"
        constants |= {f"{name}_{mode}": value for name, value in part.constants.items()}
    reads = {str(node.target) for part in captures.values() for node in part.graph.find_nodes(op="get_attr")}
    names = sorted(name for name in reads if isinstance(getattr(model, name, None), Tensor))
    graph = fx.Graph()
    places = [graph.placeholder(str(node.target)) for node in in_train.graph.find_nodes(op="placeholder")]
    graph.output(graph.call_module(BY_MODE, (*places, *map(graph.get_attr, names))))
    for part in captures.values():
        _pass_in(part.graph, names)
    inner = [captured_module(model, constants, part.graph) for part in captures.values()]
    return captured_module(model, {BY_MODE: GraphOfMode(*inner), **constants}, graph)


def _pass_in(graph: fx.Graph, names: Sequence[str]) -> None:
    """Turn tensors that a graph reads into its last inputs."""
    last = graph.find_nodes(op="placeholder")[-1]
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        for node in graph.find_nodes(op="get_attr", target=name):
            node.replace_all_uses_with(last)
            graph.erase_node(node)
