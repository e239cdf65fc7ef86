"""Capture an example call of a model with `torch.export`, as one GraphModule that calls the model's layers.

The graph is valid in train and in eval mode, because it is created from one capture in each mode.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import has_backward_hooks, require
from hra_fx.errors import CaptureError, HRAWarning
from hra_fx.example_inputs import Call, preserve_rng_state
from hra_fx.passes.canonical import CHECKS, canonical
from hra_fx.passes.compare import Attach, compare, compare_call
from hra_fx.passes.exported import LOCK, examples_with_shapes, export_call, is_leaf, without_caches
from hra_fx.passes.graph import graph_module
from hra_fx.passes.inputs import InputChecks, limit_conditions
from hra_fx.passes.modes import ByMode, merge_modes


def capture_layers(
    model: nn.Module, call: Call, dynamic_shapes: Any = None, attach: Attach | None = None
) -> fx.GraphModule:
    """Capture one call of a model. The graph is valid for other sizes and for both modes, and checks its inputs.

    By default, all sizes that the model allows may change; for images, only the batch size. The graph calls the layers
    that can be adapted, and modules without children that map one tensor to one tensor. It has operators for everything
    else. An output that `torch.export` does not support, such as a cache, is `None`. Keyword arguments become inputs in
    the order of the model's signature.
    """
    call = _prepared(model, call)
    own = set(model.parameters())
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            items = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, nn.Module)]
            if any(x.requires_grad and x not in own for item in items for x in item.parameters()):
                place = f"{path}.{name}".lstrip(".")
                raise CaptureError(
                    f"{place} has a layer that is not a child, so a graph would not train it. Use nn.ModuleList"
                )
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
                return _captured(model, example, shapes, call, attach)
            except CaptureError as error:
                failure = error
        raise failure


def capture_in_eval(model: nn.Module, call: Call) -> fx.GraphModule:
    """Capture one call of a model for a picture, much faster: the graph is valid only for this call in eval mode."""
    call = _prepared(model, call)
    with LOCK, preserve_rng_state(), without_caches(model), torch.inference_mode(False):
        only = canonical(export_call(model, call, None, training=False), model)
        constants = {name: ByMode(value, value) for name, value in only.constants.items()}
        made = graph_module(model, only.graph, {CHECKS: InputChecks([]), **constants})
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


def _captured(model: nn.Module, example: Call, shapes: Any, call: Call, attach: Attach | None) -> fx.GraphModule:
    """Capture the graph of an example, and compare it with the model for this example and a call."""
    in_train, in_eval = (
        canonical(export_call(model, example, shapes, training=training), model) for training in (True, False)
    )
    checks, sizes = InputChecks([*in_train.conditions, *in_eval.conditions]), in_train.sizes
    modules = merge_modes(in_train.graph, in_eval.graph)
    constants = {name: ByMode(value, in_eval.constants[name]) for name, value in in_train.constants.items()}
    made = graph_module(model, in_train.graph, {CHECKS: checks, **constants, **modules})
    limits = compare(model, made, example, sizes, attach)
    if example is not call:
        compare(model, made, call, (), attach)
    checks.add(limit_conditions(in_train.inputs, sizes, limits))
    if not limits.in_mixed_modes:
        vars(checks)["parts"] = tuple(made.children())
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
