"""`to_networkx`: the graph of a model with plain attributes, for further processing."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx

from hra_fx.reporting.heat import largest
from hra_fx.reporting.row import Row
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.tree import Leaf


def to_networkx(model: Any, example_inputs: Any = None) -> nx.DiGraph[str]:
    """The graph of a model: one node for each layer and operation, which includes its parameters and adapters.

    Every adapted layer is in exactly one node. Attributes are strings and numbers. All nodes have:

    * `name`, `detail` (class and shape of a layer), `kind` (`input`, `output`, `adapted_layer`, `module`, `op`, or
      `eager` for a module that is not traced), `op` (the fx opcode, or `eager`), `target`;
    * `module`: path of the module whose forward contains the node, `""` for the model;
    * `shape` and `dtype` of its value, `""` if unknown (pass `example_inputs`);
    * `parameters`: number of its parameters; a shared parameter counts at the first node that reads it.

    Adapted layers also have `adapted_layers` (their paths, one per line), `adapters`, `d` and `r`, and `rotation`,
    `mean_angle` and `angle` of the report if these can be computed (the largest value of the active adapters, or of all
    if none is active). In an adapted model, nodes of layers without an adapter have `skipped`, the reason; nodes of
    layers that are trained in full have `trained_in_full`, their paths.

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call where torch.fx cannot trace
            the whole model, or where the call gives optional arguments.

    Returns:
        An acyclic DiGraph. Edges are the flow of values. The graph has the attributes `title` and `facts`.

    Raises:
        VisualizeError: the model has another type, or does not take example inputs.
        AdapterError: `torch.export` is needed for the call, and cannot capture it.

    Example:
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [(data["name"], data.get("r")) for _, data in to_networkx(model).nodes(data=True)]
        [('input', None), ('0', 2), ('1', None), ('output', None)]
    """
    return network(drawing_of(model, example_inputs))


def network(drawing: Drawing) -> nx.DiGraph[str]:
    """The graph of a drawing with plain attributes; see `to_networkx`."""
    rows: dict[str, list[Row]] = {}
    for row in drawing.rows:
        rows.setdefault(row.path, []).append(row)
    graph: nx.DiGraph[str] = nx.DiGraph(title=drawing.title, facts=drawing.facts)
    for key, leaf in drawing.picture.nodes(data="leaf"):
        graph.add_node(key, **_described(leaf))
        if leaf.kind == "adapted_layer" and leaf.marks:
            graph.add_node(key, **_measured(leaf, [row for path in leaf.marks for row in rows.get(path, ())]))
        elif leaf.skipped:
            graph.add_node(key, skipped="\n".join(dict.fromkeys(leaf.skipped.values())))
        if leaf.trained:
            graph.add_node(key, trained_in_full="\n".join(leaf.trained))
    graph.add_edges_from(drawing.picture.edges)
    return graph


def _described(leaf: Leaf) -> dict[str, str | int]:
    return {
        "name": leaf.name,
        "detail": leaf.detail,
        "kind": leaf.kind,
        "op": leaf.op,
        "target": leaf.target,
        "module": leaf.place[-1] if leaf.place else "",
        "shape": leaf.shape,
        "dtype": leaf.dtype,
        "parameters": leaf.parameters,
    }


def _measured(leaf: Leaf, every: list[Row]) -> dict[str, str | int | float]:
    rows = [row for row in every if row.active] or every
    names = ("rotation", "mean_angle", "angle") if rows else ()
    measures = {name: largest(getattr(row, name) for row in rows) for name in names}
    return {
        "adapted_layers": "\n".join(leaf.marks),
        "adapters": "\n".join(dict.fromkeys(row.adapter for row in every)),
        "d": leaf.width,
        "r": leaf.rank,
        **{name: value for name, value in measures.items() if not math.isnan(value)},
    }
