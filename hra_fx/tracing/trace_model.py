"""One GraphModule for a whole plain model: by torch.fx, or from an example call by TorchDynamo."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from hra_fx.errors import AdapterError, CaptureError
from hra_fx.model.example_inputs import as_call, fresh
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.trace import trace


def trace_model(model: nn.Module, layers: Collection[nn.Module], example_inputs: Any = None) -> fx.GraphModule:
    """Trace a model into a GraphModule that shares its modules and parameters.

    Args:
        model: a plain model; it is not changed.
        layers: layers that must stay calls, as far as torch.fx can trace the model.
        example_inputs: one tensor, a tuple of positional or a dictionary of keyword arguments. Where torch.fx cannot
            trace the model, TorchDynamo (`torch.export`) captures this call.

    Returns:
        By torch.fx: a graph that calls modules, valid in train and eval mode. By TorchDynamo: a graph of ATen
        operators, which is called as the model was called, for the mode that the model is in.

    Raises:
        AdapterError: torch.fx cannot trace the model, and there are no example inputs; or TorchDynamo cannot either.

    Example:
        >>> model = trace_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), [])
        >>> [node.op for node in model.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    try:
        return graph_module(model, trace(model, layers))
    except CaptureError as error:
        if example_inputs is None:
            raise AdapterError(
                f"torch.fx cannot trace {type(model).__name__}: {error.reason}. Pass example_inputs to capture a call "
                "with TorchDynamo, or leave out trace=True."
            ) from error
    args, kwargs = fresh(as_call(example_inputs))
    try:
        captured: Any = torch.export.export(model, args, kwargs, strict=True).module()
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise AdapterError(
            f"TorchDynamo cannot capture {type(model).__name__} ({type(error).__name__}: {line[:160]}). Leave out "
            "trace=True: the adapted layers work without a graph."
        ) from error
    return captured  # type: ignore[no-any-return]
