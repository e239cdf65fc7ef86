"""The data of every picture and page: the graph of a model, and the report on its adapters."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from hra_fx.compat import fake_tensor_mode
from hra_fx.errors import HRAWarning, VisualizeError
from hra_fx.example_inputs import Call, normalize_inputs
from hra_fx.export.program import is_program
from hra_fx.model.graphs import drawn_graph
from hra_fx.model.state import adapted_layers, unwrap
from hra_fx.reporting.columns import is_identity
from hra_fx.reporting.report import Report, report
from hra_fx.reporting.words import counted, low_to_high
from hra_fx.view.graph import leaves_of
from hra_fx.view.subject import boxes_of, own_parameters
from hra_fx.view.tree import Leaf, Scope, prefixes


@dataclass(frozen=True)
class Drawing:
    """The data for drawing a model."""

    name: str  # the class of the model
    title: str  # such as "ResNet with HRA"
    facts: str  # one line: the number of adapted layers, their ranks and parameters
    picture: nx.DiGraph[str]  # the leaves, and the flow of values between them; see `graph.leaves_of`
    report: Report  # empty for a plain model

    def title_of(self, root: Scope) -> str:
        """The title of the picture of the model, or of a module in it."""
        return f"{root.path} in {self.title}" if root.path else self.title


def drawing_of(model: Any, example_inputs: Any = None) -> Drawing:
    """Collect the data for drawing a model, which is not changed; see `visualize`. A wrapper (DDP) is removed."""
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
    layers = adapted_layers(model)
    if "" in layers:
        raise VisualizeError(
            f"`model` is a single adapted layer ({type(model).__name__}). Pass the model that contains it, and the "
            "layer's path as `focus`."
        )
    found = report(model) if layers else Report(())
    graph = drawn_graph(model, example_inputs)
    if graph and example_inputs is not None and not any("val" in node.meta for node in graph.graph.nodes):
        _note_shapes(graph, normalize_inputs(example_inputs))
    boxes = boxes_of(model)
    picture = leaves_of(model, graph, boxes)
    parameters = sum(parameter.numel() for parameter in own_parameters(model))
    _mark(picture, found)
    facts = _facts(parameters, [box.rank for box in boxes.values()], found)
    facts += " · not traced: pass example_inputs to draw the data flow" * (graph is None)
    facts += " · not trained yet (identity)" * is_identity(found.rows)
    name = picture.graph["classes"][""]
    return Drawing(name, name + " with HRA" * bool(found.rows), facts, picture, found)


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


def _facts(parameters: int, ranks: Sequence[int], found: Report) -> str:
    if not ranks:
        return f"{parameters:,} parameters · no adapters"
    adapter = sum(row.parameters for row in found.rows)
    words = f"{counted(len(ranks), 'adapted layer')} · r = {low_to_high(ranks)} · {adapter:,} adapter parameters"
    return f"{words} ({adapter / max(parameters, 1):.2%} of {parameters:,})"


def _mark(picture: nx.DiGraph[str], found: Report) -> None:
    """Record at each leaf the layers without an adapter that it represents."""
    skipped = {layer.path: layer for layer in found.skipped}
    layers = dict.fromkeys((*skipped, *found.trained_in_full))
    below: dict[str, list[str]] = {}  # path of a module -> the layers that it is or contains
    for path in layers:
        for module in prefixes(path):
            below.setdefault(module, []).append(path)
    leaves: dict[str, Leaf] = dict(picture.nodes(data="leaf"))
    for key, leaf in leaves.items():
        # A graph of operators does not have boxes for modules, so a layer is shown where its parameters are read.
        paths = [path for own in leaf.paths for path in below.get(own, ())]
        paths = list(dict.fromkeys([*paths, *(path for path in leaf.readers if path in layers)]))
        here = tuple(skipped[path] for path in paths if path in skipped)
        full = tuple(path for path in paths if path not in skipped)
        picture.nodes[key]["leaf"] = replace(leaf, skipped=here, trained=full)
