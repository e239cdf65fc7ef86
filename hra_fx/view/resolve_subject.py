"""Turns any model that a user wants to draw into a `Subject`: adapted, plain and folded models, graphs and programs."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from hra_fx.errors import VisualizeError
from hra_fx.export.captured import is_captured, is_program
from hra_fx.export.insert import find_rotate_nodes
from hra_fx.model.example_inputs import normalize_inputs
from hra_fx.model.graph_module import tag_adapted_layers
from hra_fx.model.state import adapted_layers
from hra_fx.tracing.graphs import adapted_graphs, graph_of_call, plain_graphs
from hra_fx.tracing.trace_model import is_graph_of_call
from hra_fx.view.programs import subject_of_operators, subject_of_program
from hra_fx.view.shapes import note_shapes
from hra_fx.view.subject import Subject, subject_of


def has_adapters(model: Any) -> bool:
    """Whether anything in a model, graph or program is adapted."""
    if is_captured(model):
        return bool(find_rotate_nodes(model.graph))
    return isinstance(model, nn.Module) and bool(adapted_layers(model))


def find_subject(model: Any, example_inputs: Any = None) -> Subject:
    """Collect what is drawn of a model. The model is not changed.

    Args:
        model: a module, transformed or not, or a `torch.export.ExportedProgram`.
        example_inputs: inputs of one call, as for `hra_fx.graphs`.

    Raises:
        VisualizeError: the model has another type, is a single adapted layer, or does not take example inputs.
        AdapterError: `torch.export` is needed for the call, and cannot capture it.
    """
    if is_captured(model):
        if example_inputs is not None:
            raise VisualizeError(
                f"`example_inputs` must be None for a {type(model).__name__}, which already has the shapes."
            )
        return subject_of_program(model) if is_program(model) else subject_of_operators(model)
    if not isinstance(model, nn.Module):
        raise VisualizeError(
            "`model` must be a torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram, "
            f"got {type(model).__name__}."
        )
    if "" in adapted_layers(model):
        raise VisualizeError(
            f"`model` is a single adapted layer ({type(model).__name__}). Pass the model that contains it, and the "
            "layer's path as `focus`."
        )
    found = _traced(model)
    if example_inputs is not None:
        call = normalize_inputs(example_inputs)
        if "" not in found or not is_graph_of_call(model, found[""].graph, call):
            found = {"": graph_of_call(model, call)}
        note_shapes(found[""], call)
    return subject_of(model, found)


def _traced(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Module path -> its traced graph, for the largest parts that fx can trace."""
    if isinstance(model, fx.GraphModule):
        tag_adapted_layers(model)  # tags the nodes of its adapted layers again
        return {"": model}
    return adapted_graphs(model) if adapted_layers(model) else plain_graphs(model)
