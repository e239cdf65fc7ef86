"""What a drawing shows apart from the values of parameters: boxes of traced graphs, and a line of facts."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from hra_fx.compat import fake_tensor_mode
from hra_fx.errors import HRAWarning, VisualizeError
from hra_fx.export.program import is_program
from hra_fx.model.example_inputs import Call, normalize_inputs
from hra_fx.model.state import adapted_layers, unwrap
from hra_fx.reporting.words import counted, low_to_high
from hra_fx.tracing.graphs import graphs_of
from hra_fx.view.graph import leaves_of
from hra_fx.view.subject import Subject, subject_of


def sketch_of(model: Any, example_inputs: Any) -> tuple[str, str, nx.DiGraph[str]]:
    """Trace any model (plain, adapted or folded), graph or program.

    Returns the class of the model, a line of facts, and the leaves (see `leaves_of`).
    """
    if is_program(model):
        if example_inputs is not None:
            raise VisualizeError("`example_inputs` must be None for an ExportedProgram, which already has the shapes.")
        model = model.module(check_guards=False)  # a GraphModule of operators
    if not isinstance(model, nn.Module):
        raise VisualizeError(
            "`model` must be a torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram, "
            f"got {type(model).__name__}."
        )
    model = unwrap(model)
    if "" in adapted_layers(model):
        raise VisualizeError(
            f"`model` is a single adapted layer ({type(model).__name__}). Pass the model that contains it, and the "
            "layer's path as `focus`."
        )
    graph = graphs_of(model, example_inputs, is_drawn=True).get("")
    if graph and example_inputs is not None and not any("val" in node.meta for node in graph.graph.nodes):
        _note_shapes(graph, normalize_inputs(example_inputs))
    subject = subject_of(model, graph)
    return subject.classes.get("", type(model).__name__), _facts(subject), leaves_of(subject)


def _note_shapes(module: fx.GraphModule, call: Call) -> None:
    """Store the fake value of every node in `node.meta["val"]`; a warning if the graph does not run on fake tensors."""
    args, kwargs = call
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        mode = fake_tensor_mode()
        # A forward may write into its buffers. A copied GraphModule shares the tensors that are not in the memo.
        tensors = (*module.parameters(), *module.buffers())
        copied = copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
        with torch.no_grad():
            FakeTensorProp(copied, mode).propagate(*bound.arguments.values())
    except Exception as error:  # shapes are optional, and any operator of the model may fail on fake tensors
        why = str(error).strip().partition("\n")[0]
        text = f"The graph does not run on `example_inputs` ({why}), so the picture has no shapes. Check the inputs."
        warnings.warn(text, HRAWarning, stacklevel=2)
        return
    for node, noted in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        if "val" in noted.meta:
            node.meta["val"] = noted.meta["val"]


def _facts(subject: Subject) -> str:
    traced = "traced" if subject.graph else "not traced: pass example_inputs to draw the data flow"
    if not subject.layers:
        return f"{subject.parameters:,} parameters · no adapters · {traced}"
    ranks = low_to_high([layer.rank for layer in subject.layers.values()])
    adapter = sum(layer.vectors for layer in subject.layers.values())
    share = adapter / max(subject.parameters, 1)
    layers = counted(len(subject.layers), "adapted layer")
    words = f"{layers} · r = {ranks} · {adapter:,} adapter parameters"
    return f"{words} ({share:.2%} of {subject.parameters:,}) · {traced}"
