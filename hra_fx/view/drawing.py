"""The data of every picture and page: the graph of a model, and the report on its adapters."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from hra_fx.compat import fake_tensor_mode
from hra_fx.errors import HRAWarning, VisualizeError
from hra_fx.export.captured import is_captured, is_program
from hra_fx.export.ops import find_rotate_nodes
from hra_fx.model.example_inputs import Call, normalize_inputs
from hra_fx.model.graph_module import tag_adapted_layers
from hra_fx.model.state import adapted_layers, unwrap
from hra_fx.reporting.heat import is_identity
from hra_fx.reporting.report import report
from hra_fx.reporting.row import Row
from hra_fx.tracing.graphs import adapted_graphs, graph_of_call, is_graph_of_call, plain_graphs
from hra_fx.view.graph import leaves_of
from hra_fx.view.scopes import scope_tree
from hra_fx.view.subject import Subject, subject_of, subject_of_operators, subject_of_program
from hra_fx.view.tree import Leaf, Scope, prefixes


@dataclass(frozen=True)
class Drawing:
    """The data for drawing a model.

    Attributes:
        name: the class of the model.
        title: the heading, such as `"ResNet with HRA"`.
        facts: one line: the number of adapted layers, their ranks and parameters, and what was traced.
        picture: the leaves, and the flow of values between them; see `graph.leaves_of`.
        rows: the rows of the report; empty for a plain model.
        skipped: path of a layer without an adapter -> the reason; empty for a plain model.
        refused: paths of skipped layers that should have an adapter because the configuration selects them.
        trained_in_full: paths of the layers that are trained in full.
    """

    name: str
    title: str
    facts: str
    picture: nx.DiGraph[str]
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    refused: frozenset[str] = frozenset()
    trained_in_full: tuple[str, ...] = ()

    def tree(self) -> Scope:
        """The leaves grouped by module, with identical neighbors as one item."""
        return scope_tree(self.picture, self.name)


def drawing_of(model: Any, example_inputs: Any = None) -> Drawing:
    """Collect the data for drawing a model. The model is not changed.

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`. A
            wrapper of a whole model (DDP, `torch.compile`) is removed.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call if torch.fx cannot trace
            the whole model, or if the call passes optional arguments.

    Raises:
        VisualizeError: the model has another type, or does not take example inputs.
        AdapterError: `torch.export` is needed for the call, but cannot capture it.
    """
    model = unwrap(model)
    found = report(model) if _has_adapters(model) else None
    subject = _find_subject(model, example_inputs)
    name = subject.classes.get("", type(model).__name__)
    picture = leaves_of(subject)
    if found is None:
        return Drawing(name, name, _facts(subject), picture, (), {})
    skipped = {layer.path: layer.reason for layer in found.skipped}
    refused = frozenset(layer.path for layer in found.skipped if layer.targeted)
    _mark(picture, skipped, refused, found.trained_in_full)
    facts = _facts(subject) + " · not trained yet (identity)" * is_identity(found.rows)
    return Drawing(name, f"{name} with HRA", facts, picture, found.rows, skipped, refused, found.trained_in_full)


def _has_adapters(model: Any) -> bool:
    """Whether anything in a model, graph or program is adapted."""
    if is_captured(model):
        return bool(find_rotate_nodes(model.graph))
    return isinstance(model, nn.Module) and bool(adapted_layers(model))


def _find_subject(model: Any, example_inputs: Any) -> Subject:
    """Convert any model (plain, adapted or folded), graph or program to a `Subject`."""
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
    found = _graphs_of(model)
    if example_inputs is not None:
        call = normalize_inputs(example_inputs)
        if "" not in found or not is_graph_of_call(model, found[""].graph, call):
            found = {"": graph_of_call(model, call)}
        note_shapes(found[""], call)
    return subject_of(model, found)


def _graphs_of(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Module path -> its traced graph, for the largest parts that fx can trace."""
    if isinstance(model, fx.GraphModule):
        tag_adapted_layers(model)  # marks the nodes of its adapted layers again
        return {"": model}
    return adapted_graphs(model) if adapted_layers(model) else plain_graphs(model)


def _mark(
    picture: nx.DiGraph[str], skipped: Mapping[str, str], refused: Collection[str], trained: Collection[str]
) -> None:
    """Record at each leaf the layers without an adapter that it represents."""
    layers = {*skipped, *trained}
    below: dict[str, list[str]] = {}  # path of a module -> the layers that it is or contains
    for path in (*skipped, *trained):
        for module in prefixes(path):
            below.setdefault(module, []).append(path)
    leaves: dict[str, Leaf] = dict(picture.nodes(data="leaf"))
    for key, leaf in leaves.items():
        # A graph of operators does not have boxes for modules, so a layer is shown where its parameters are read.
        paths = [path for own in leaf.paths for path in below.get(own, ())]
        paths += [path for path in leaf.readers if path in layers]
        here = {path: skipped[path] for path in paths if path in skipped}
        lost = tuple(path for path in here if path in refused)
        full = tuple(dict.fromkeys(path for path in paths if path not in skipped))
        picture.nodes[key]["leaf"] = replace(leaf, skipped=here, refused=lost, trained=full)


def _facts(subject: Subject) -> str:
    if not subject.layers:
        return f"{subject.parameters:,} parameters · no adapters · {_traced(subject)}"
    ranks = sorted({layer.rank for layer in subject.layers.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    adapter = sum(layer.vectors for layer in subject.layers.values())
    share = adapter / max(subject.parameters, 1)
    words = f"{_number(len(subject.layers), 'adapted layer')} · r = {span} · {adapter:,} adapter parameters"
    return f"{words} ({share:.2%} of {subject.parameters:,}) · {_traced(subject)}"


def _traced(subject: Subject) -> str:
    """Describe which part of the model is drawn as a graph."""
    if "" in subject.graphs:
        return "traced as one graph"
    modules = len(subject.graphs.keys() - subject.layers.keys())
    what = f"{_number(modules, 'module')} traced" if modules else "not traced"
    return f"{what}: pass example_inputs to draw the whole data flow"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def note_shapes(module: fx.GraphModule, call: Call) -> None:
    """Store the fake value of every node in `node.meta["val"]`.

    Warns:
        HRAWarning: the graph does not run on fake tensors (because of wrong inputs, or an operator without a fake
            kernel). Then the graph is not changed.

    Args:
        module: the graph of the whole model from torch.fx; its placeholders are the arguments of the call.
        call: the example inputs.
    """
    try:
        mode = fake_tensor_mode()
        with torch.no_grad():
            copied = _copy(module, mode)
            FakeTensorProp(copied, mode).propagate(*_inputs(module, call))
    except Exception as error:  # shapes are optional, and any operator of the model may fail on fake tensors
        why = str(error).strip().partition("\n")[0]
        text = f"The graph does not run on `example_inputs` ({why}), so the picture has no shapes. Check the inputs."
        warnings.warn(text, HRAWarning, stacklevel=2)
        return
    for node, noted in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        if "val" in noted.meta:
            node.meta["val"] = noted.meta["val"]


def _copy(module: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """Copy a graph with fake tensors, because a forward may write into its buffers."""
    tensors = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in tensors}
    # A copied GraphModule shares the tensors that its graph reads, unless they are in the memo.
    return copy.deepcopy(module, memo)


def _inputs(module: fx.GraphModule, call: Call) -> tuple[Any, ...]:
    """Return one value for each placeholder.

    Raises:
        TypeError: the graph does not have these arguments.
    """
    args, kwargs = call
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())
