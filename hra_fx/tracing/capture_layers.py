"""Capture an example call of a model with `torch.export`, as one GraphModule that calls the model's layers.

The graph is valid in train and in eval mode, because it is created from one capture in each mode.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import has_backward_hooks, require
from hra_fx.errors import CaptureError, HRAWarning
from hra_fx.layers.target import find_kind
from hra_fx.model.example_inputs import Call, preserve_rng_state
from hra_fx.model.graph_module import GraphOfMode
from hra_fx.tracing.by_mode import ByMode, merge_modes
from hra_fx.tracing.canonical import CHECKS, Canonical, InBlockError, canonical, captured_module
from hra_fx.tracing.compare import compare, compare_call
from hra_fx.tracing.exported import (
    LOCK,
    BranchError,
    depends_on_mode,
    examples_with_shapes,
    export_call,
    is_leaf,
    without_caches,
)
from hra_fx.tracing.graph_module import NestedGraph, attribute
from hra_fx.tracing.inputs import Condition, InputChecks, size_conditions


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
    if is_trained:
        _warn_of_parts(made)
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

    Leaves in a block with a separate graph, which could not call them, are inlined. If the call branches on values, it
    runs with its values.
    """
    inlined: set[str] = set()
    with_values = False
    while True:
        modes = []
        try:
            for training in trained:
                program = export_call(
                    model, example, shapes, training=training, with_values=with_values, inlined=inlined
                )
                modes.append(canonical(program, model))
            return modes
        except BranchError:
            if with_values:
                raise
            with_values = True
        except InBlockError as error:
            inside = {path: model.get_submodule(path) for path in error.paths}
            if any(depends_on_mode(part) or find_kind(part) for part in inside.values()):
                raise
            inlined |= inside.keys()


# --- both modes -------------------------------------------------------------------------------------------------------


def _in_both_modes(model: nn.Module, in_train: Canonical, in_eval: Canonical, checks: InputChecks) -> fx.GraphModule:
    """Create a GraphModule with the modules and tensors of a model that is valid in both modes."""
    constants = in_train.constants | _renamed(in_eval, in_train.constants)

    def make(*graphs: fx.Graph) -> nn.Module:
        return GraphOfMode(*(captured_module(model, constants, graph) for graph in graphs))

    modules = merge_modes(in_train.graph, in_eval.graph, make)
    return captured_module(model, {CHECKS: checks, **constants, **modules}, in_train.graph)


def _renamed(part: Canonical, others: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Give constants the names of equal ones in `others`, and new names to the rest. Returns the rest."""
    free = dict(others)
    names = {}
    for name, constant in part.constants.items():
        names[name] = next((each for each, other in free.items() if _is_same(constant, other)), f"{name}_in_eval")
        free.pop(names[name], None)
    for node in part.graph.find_nodes(op="call_module"):
        node.target = names.get(str(node.target), node.target)
    return {names[name]: constant for name, constant in part.constants.items() if names[name] not in others}


def _is_same(one: nn.Module, other: nn.Module) -> bool:
    if isinstance(one, ByMode) and isinstance(other, ByMode):
        return torch.equal(one.in_train, other.in_train)
    return isinstance(one, NestedGraph) and isinstance(other, NestedGraph) and one.source() == other.source()


def _warn_of_parts(made: fx.GraphModule) -> None:
    """Warn of layers that a pass over the graph does not see."""
    found: dict[str, str] = {}
    for name, part in made.named_children():
        for kind in ("in_train", "in_eval") if isinstance(part, GraphOfMode) else ():
            calls = [str(node.target) for node in getattr(part, kind).graph.find_nodes(op="call_module")]
            found |= {f"{name}.{kind}": path for path in calls[::-1] if find_kind(attribute(made, path))}
    if found:
        text = (
            f"{type(made).__name__}: its graph calls {next(iter(found.values()))} in {', '.join(found)}, because the "
            "other mode runs other operations there. Adapters and folding work as usual, but a pass of your own must "
            "also visit these graphs."
        )
        warnings.warn(text, HRAWarning, stacklevel=2)
