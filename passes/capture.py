"""Capture an example call of a model with `torch.export`, as one GraphModule that calls the model's layers.

The graph is valid in train and in eval mode. One capture in eval mode is enough for a model that does the same in train
mode. Otherwise, the graph is created from one capture in each mode.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn

from hra_fx.compat import has_backward_hooks, require
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call, preserve_rng_state
from hra_fx.passes.canonical import CHECKS, Canonical, canonical
from hra_fx.passes.compare import Attach, compare, compare_call
from hra_fx.passes.exported import LOCK, examples_with_shapes, export_call, is_leaf, without_caches
from hra_fx.passes.graph import graph_module
from hra_fx.passes.inputs import InputChecks, limit_conditions, place_of
from hra_fx.passes.modes import ByMode, merge_modes


def capture_layers(
    model: nn.Module, call: Call, dynamic_shapes: Any = None, attach: Attach | None = None, *, only: bool = False
) -> fx.GraphModule:
    """Capture one call of a model. The graph is valid for other sizes and for both modes, and checks its inputs.

    By default, all sizes that the model allows may change; for images, only the batch size. The graph calls the layers
    that can be adapted, and modules without children that map one tensor to one tensor. It has operators for everything
    else. An output that `torch.export` does not support, such as a cache, is `None`. Keyword arguments become inputs in
    the order of the model's signature.

    With `only`, the graph is for a picture: valid only for this call in eval mode, but captured much faster.
    """
    require("a graph captured by torch.export")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device. Load the weights first")
    if not only:
        _check_parts(model)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*call[0], **call[1])
    except TypeError as error:
        raise CaptureError(f"the example does not fit its forward: {error}") from error
    order = [*signature.parameters, *call[1]]
    call = call[0], dict(sorted(call[1].items(), key=lambda item: order.index(item[0])))
    with LOCK, preserve_rng_state(), without_caches(model), torch.inference_mode(False):
        if only:
            made = _module_of(model, _canonical(model, call, None, training=False))
            compare_call(model, made, call)
            return made
        tries = examples_with_shapes(model, call) if dynamic_shapes is None else [(call, dynamic_shapes)]
        for example, shapes in tries:
            try:
                return _captured(model, example, shapes, call, attach)
            except CaptureError as error:
                failure = error
        raise failure


def _check_parts(model: nn.Module) -> None:
    """Raise an error for what a capture would drop without an error."""
    for path, part in model.named_modules():
        if is_leaf(part):
            continue
        if has_backward_hooks(part):
            raise CaptureError(f"backward hooks are registered for {path or 'it'}, which a graph drops. Remove them")
        if getattr(part, "gradient_checkpointing", False) is True:
            raise CaptureError(f"{path or 'it'} checkpoints its activations, which a graph drops. Disable that first")


def _captured(model: nn.Module, example: Call, shapes: Any, call: Call, attach: Attach | None) -> fx.GraphModule:
    """Capture the graph of an example, and compare it with the model for this example and a call."""
    # Also where both modes do the same for the example: each has its own conditions.
    in_eval, captured = (_canonical(model, example, shapes, training=training) for training in (False, True))
    made = _module_of(model, captured, in_eval)
    checks: Any = made.get_submodule(CHECKS)
    limits = compare(model, made, example, captured.sizes, attach)
    for part in made.children():
        if limits.one_mode and isinstance(part, ByMode):
            part.parts = tuple(other for other in made.modules() if other is not made)
    checks.add(limit_conditions(captured.inputs, captured.sizes, limits))
    if example is not call:
        compare_call(model, made, call)
    return made


def _canonical(model: nn.Module, call: Call, shapes: Any, *, training: bool) -> Canonical:
    return canonical(export_call(model, call, shapes, training=training), model)


def _module_of(model: nn.Module, captured: Canonical, in_eval: Canonical | None = None) -> fx.GraphModule:
    """Create a module from a graph, merged with one of eval mode if they differ."""
    merged = merge_modes(model, captured.graph, in_eval.graph) if in_eval else {}
    other = in_eval or captured
    both = other.constants | captured.constants
    constants = {name: ByMode(value, other.constants.get(name, value)) for name, value in both.items()}
    names = [place_of(str(node.target)) for node in captured.inputs.arguments]
    checks = InputChecks(names, [*captured.conditions, *other.conditions])
    return graph_module(model, captured.graph, {CHECKS: checks, **constants, **merged})
