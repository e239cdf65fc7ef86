"""Whatever a user wants to see, as the subject of a picture: adapted, plain and folded models, graphs and programs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from hra_fx.errors import VisualizeError
from hra_fx.export.captured import is_captured
from hra_fx.export.insert import rotations
from hra_fx.export.program import is_program
from hra_fx.model.example_inputs import as_call
from hra_fx.model.graph_module import shown_in
from hra_fx.model.state import sites_of
from hra_fx.reporting import Row
from hra_fx.tracing.graphs import graphs, plain_graphs
from hra_fx.tracing.whole import whole_graphs
from hra_fx.view.programs import subject_of_captured, subject_of_program
from hra_fx.view.shapes import note_shapes
from hra_fx.view.subject import Subject, subject_of


def has_reflections(model: Any) -> bool:
    """Whether anything in a model, graph or program is adapted; of anything else no."""
    if is_program(model) or is_captured(model):
        return bool(rotations(model.graph))
    return isinstance(model, nn.Module) and bool(sites_of(model))


def find_subject(model: Any, example_inputs: Any = None, rows: Collection[Row] = ()) -> Subject:
    """What is to be drawn of a model; nothing in it is changed.

    Args:
        model: a module, transformed or not, or a `torch.export.ExportedProgram`.
        example_inputs: those of one call, as `hra_fx.graphs` takes them.
        rows: those of the model's report.

    Raises:
        VisualizeError: it is none of these, a single adapted layer, or has no use for example inputs.
        AdapterError: the model does not run on the inputs, or TorchDynamo cannot record the call.
    """
    if is_program(model) or is_captured(model):
        if example_inputs is not None:
            raise VisualizeError(
                f"example_inputs: a captured program ({type(model).__name__}) knows its shapes. Leave them out."
            )
        return subject_of_program(model, rows) if is_program(model) else subject_of_captured(model, rows)
    if not isinstance(model, nn.Module):
        raise VisualizeError(
            f"model: a {type(model).__name__}. Give a torch.nn.Module, a torch.fx.GraphModule or a "
            "torch.export.ExportedProgram."
        )
    if "" in sites_of(model):
        raise VisualizeError(
            f"model: it is one adapted layer by itself ({type(model).__name__}), with nothing around it to be drawn. "
            "Give the model that it is in, and the layer's path as focus."
        )
    found = _captured(model)
    of_call = example_inputs is not None and "" not in found
    if of_call:
        found = whole_graphs(model, as_call(example_inputs))
    if example_inputs is not None and "" in found:
        note_shapes(found[""], as_call(example_inputs))
    return subject_of(model, found, rows, of_call=of_call)


def _captured(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Module path -> what fx has of it."""
    if isinstance(model, fx.GraphModule):
        shown_in(model)  # marks the sites in it again
        return {"": model}
    if sites_of(model):
        return graphs(model)
    return plain_graphs(model)
