"""Create the graph of a model, with torch.fx, or with torch.export from an example call."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from torch import fx, nn

from hra_fx.compat import has_own_hooks
from hra_fx.errors import AdapterError, CaptureError, HRAWarning
from hra_fx.layers.target import find_kind
from hra_fx.model.example_inputs import Call, example_call, guessed_call, normalize_inputs
from hra_fx.model.graph_module import insert
from hra_fx.model.state import adapted_layers, base_model_view
from hra_fx.tracing.capture_layers import capture_in_eval, capture_layers
from hra_fx.tracing.compare import ExampleError, compare, compare_call
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.tracer import trace


def _by_fx(model: nn.Module, layers: Collection[nn.Module], call: Call | None) -> fx.GraphModule | None:
    """Trace a model with torch.fx. `None` if the graph does not take exactly the arguments of the call.

    A graph of torch.fx takes the required arguments. It has the defaults of all others.
    """
    graph, modules = trace(model, layers)
    if call is not None:
        args, kwargs = call
        try:
            given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        except TypeError:
            return None
        if list(given)[1:] != [str(node.target) for node in graph.find_nodes(op="placeholder")]:
            return None
    return graph_module(model, graph, modules)


def trace_model(
    model: nn.Module, layers: Collection[nn.Module], example_inputs: Any = None, dynamic_shapes: Any = None
) -> fx.GraphModule:
    """Trace a model into a GraphModule that shares its modules and parameters, for train and eval mode."""
    call = None if example_inputs is None else normalize_inputs(example_inputs)
    reason = ""
    if dynamic_shapes is None:
        try:
            if has_own_hooks(model):
                raise CaptureError("it has forward hooks, which torch.fx does not run")
            if made := _by_fx(model, layers, call):
                if example := call or guessed_call(model):  # without an example, nothing can be compared
                    compare(model, made, example)
                return made
        except CaptureError as error:
            if call and isinstance(error, ExampleError):
                raise _refusal(model, error) from error
            reason = f"torch.fx cannot trace {type(model).__name__}: {error.reason}. "
    call = call or example_call(model)
    if call is None:
        raise AdapterError(
            f"{reason}Pass example_inputs, the arguments of one call, with which torch.export may capture it, or leave "
            "out trace=True."
        )
    try:
        return capture_layers(model, call, dynamic_shapes)
    except CaptureError as error:
        raise _refusal(model, error, "Leave out trace=True: the adapted layers work without a graph.") from error


def _refusal(model: nn.Module, error: CaptureError, advice: str = "") -> AdapterError:
    name = type(model).__name__
    if isinstance(error, ExampleError):
        return AdapterError(f"{name}: {error.reason}. Pass `example_inputs` that the model runs on.")
    return AdapterError(f"torch.export cannot capture {name}: {error.reason}. {advice}")


def graph_of(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Trace an adapted model, with the reflections. For a `GraphModule`, the result is a copy of its graph.

    With example inputs, the result is the graph of this call, captured with `torch.export` if necessary.
    """
    if isinstance(model, fx.GraphModule):  # its own graph has the reflections
        return graph_module(model, copy.deepcopy(model.graph), {})
    with base_model_view(model):
        made = trace_model(model, adapted_layers(model).values(), example_inputs)
    insert(made)
    return made


def drawn_graph(model: nn.Module, example_inputs: Any) -> fx.GraphModule | None:
    """Trace a model, adapted or not, for a picture: faster than `graph_of`, and valid for this call in eval mode.

    `None` if the model cannot be traced.
    """
    if isinstance(model, fx.GraphModule):
        return graph_of(model)
    call = None if example_inputs is None else normalize_inputs(example_inputs)
    layers: list[nn.Module] = [*adapted_layers(model).values()]
    layers = layers or [part for part in model.modules() if find_kind(part)]
    if call is None and (not layers or model in layers):  # one box
        return None
    try:
        with base_model_view(model):
            made = _drawn(model, layers, call)
    except (AdapterError, CaptureError) as error:
        if call is not None:
            why = _refusal(model, error) if isinstance(error, CaptureError) else error
            warnings.warn(f"The picture has no data flow: {why}", HRAWarning, stacklevel=2)
        return None
    insert(made)
    return made


def _drawn(model: nn.Module, layers: Collection[nn.Module], call: Call | None) -> fx.GraphModule:
    try:
        if made := _by_fx(model, layers, call):
            if call:
                with suppress(ExampleError):  # a drawing warns of it
                    compare_call(model, made, call)
            return made
    except CaptureError:
        if call is None:
            raise
    assert call is not None
    return capture_in_eval(model, call)
