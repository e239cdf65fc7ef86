"""One GraphModule for a whole model: by torch.fx, or from an example call by torch.export."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
from torch import fx, nn

from hra_fx.errors import AdapterError, CaptureError
from hra_fx.model.example_inputs import Call, clone_inputs, normalize_inputs, preserve_rng_state
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.recorded_state import checked_capture
from hra_fx.tracing.trace import trace
from hra_fx.tracing.unchanged import Snapshot


def is_graph_of_call(model: nn.Module, graph: fx.Graph, call: Call) -> bool:
    """Whether a graph of torch.fx is that of a call; optional arguments have their defaults in the graph.

    Args:
        model: the model; the graph of a `GraphModule` is its own, with all arguments.
        graph: the graph of the whole model.
        call: the call.

    Example:
        >>> model = nn.Linear(6, 8)
        >>> is_graph_of_call(model, trace(model, []).graph, ((torch.ones(1, 6),), {}))
        True
    """
    if isinstance(model, fx.GraphModule):
        return True
    args, kwargs = call
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    try:
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    except TypeError:
        return False
    return list(given)[1:] == names


def trace_model(model: nn.Module, layers: Collection[nn.Module], example_inputs: Any = None) -> fx.GraphModule:
    """Trace a model into a GraphModule that shares its modules and parameters.

    Args:
        model: a plain model; it is not changed.
        layers: layers that must stay calls, as far as torch.fx can trace the model.
        example_inputs: one tensor, a tuple of positional or a dictionary of keyword arguments. Where torch.fx cannot
            trace the model, or the call gives optional arguments, `torch.export` captures this call.

    Returns:
        By torch.fx: a graph that calls modules, valid in train and eval mode. By `torch.export`: a graph of ATen
        operators, which is called as the model was called, for the mode that the model is in.

    Raises:
        AdapterError: torch.fx cannot trace the model and no example inputs were given, `torch.export` cannot trace it
            either, or the exported graph would not train like the model.

    Example:
        >>> model = trace_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), [])
        >>> [node.op for node in model.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    try:
        traced = trace(model, layers)
        if example_inputs is None or is_graph_of_call(model, traced.graph, normalize_inputs(example_inputs)):
            return graph_module(model, traced)
    except CaptureError as error:
        if example_inputs is None:
            raise AdapterError(
                f"torch.fx cannot trace {type(model).__name__}: {error.reason}. Pass example_inputs to capture a call "
                "with torch.export, or leave out trace=True."
            ) from error
    advice = "Leave out trace=True: the adapted layers work without a graph."
    return export_call(model, normalize_inputs(example_inputs), advice, is_trained=True)


def export_call(model: nn.Module, call: Call, advice: str, *, is_trained: bool = False) -> fx.GraphModule:
    """Capture one call of a model with `torch.export`.

    With `strict=True` TorchDynamo reads the Python code: it is two to five times slower, and warns about the outputs
    that transformers collects in a global. Without it the forward runs on tensors without values, so what that leaves
    behind in the model is removed.

    Args:
        model: the model; it is not changed.
        call: the example call.
        advice: what to do where `torch.export` refuses.
        is_trained: refuse a graph whose gradients or random numbers would not be those of the model.

    Returns:
        A graph of ATen operators over the model's own parameters and buffers, which is called as the model is.

    Raises:
        AdapterError: `torch.export` cannot capture the call, or see `is_trained`.

    Example:
        >>> module = export_call(nn.Linear(6, 8), ((torch.ones(1, 6),), {}), "")
        >>> [node.name for node in module.graph.find_nodes(op="get_attr")]
        ['weight', 'bias']
    """
    args, kwargs = clone_inputs(call)
    with ExitStack() as restore:
        restore.callback(Snapshot(model).restore)
        restore.enter_context(preserve_rng_state())
        restore.enter_context(_quiet())
        try:
            with checked_capture(model) if is_trained else nullcontext():
                captured: Any = torch.export.export(model, args, kwargs, strict=False).module()
        except CaptureError as error:
            raise AdapterError(
                f"torch.export cannot capture {type(model).__name__}: {error.reason}. {advice}"
            ) from error
        except Exception as error:
            line = str(error).strip().split("\n")[0]
            raise AdapterError(
                f"torch.export cannot capture {type(model).__name__} ({type(error).__name__}: {line[:160]}). {advice}"
            ) from error
    return captured  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without warnings, and without the graph that `torch.export` prints to stderr where it refuses."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
