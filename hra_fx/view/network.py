"""`to_networkx`: the graph of a model as plain values, for whoever wants to go on with it."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx

from hra_fx.reporting.row import Row
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.annotations import Annotations
from hra_fx.view.tree import Leaf


def to_networkx(model: Any, example_inputs: Any = None) -> nx.DiGraph[str]:
    """The graph of a model: one node for each layer and operation, with parameters and reflections folded into them.

    Every adapted layer is in exactly one node. Attributes are strings and numbers. All nodes have:

    * `name`, `detail` (class and shape of a layer), `kind` (`input`, `output`, `site`, `module`, `op`, or `eager` for a
      module outside of every captured graph), `op` (the fx opcode, or `eager`), `target`;
    * `module`: the path of the module in whose forward it stands, `""` for the model's;
    * `shape` and `dtype` of its value, `""` where not known (give `example_inputs`);
    * `parameters`: how many numbers it holds, each tensor counted where it is read first.

    Only sites have `sites` (the paths of the adapted layers, in lines), `adapters`, `d` and `r`, and `rotation`,
    `mean_angle` and `angle` of the report, where these can be computed: of several adapters the largest, of those in
    use, if any is. Only what could carry reflections and does not, in a model with others that do, has `skipped`, the
    reason: such a layer, the operation that reads its weight, or the one box of a module that has such layers.

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example_inputs: those of one call: for shapes, and for a whole graph by TorchDynamo where fx has none.

    Returns:
        An acyclic DiGraph; edges are the flow of values. Its own attributes are `title` and `facts`.

    Raises:
        VisualizeError: it is no model, or has no use for example inputs.
        AdapterError: the model does not run on the inputs, or TorchDynamo cannot record the call.

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
    notes = Annotations(None, drawing.skipped)
    graph: nx.DiGraph[str] = nx.DiGraph(title=drawing.title, facts=drawing.facts)
    for key, leaf in drawing.picture.nodes(data="leaf"):
        graph.add_node(key, **_described(leaf))
        if leaf.kind == "adapted_layer" and leaf.marks:
            graph.add_node(key, **_rotated(leaf, [row for mark in leaf.marks for row in rows.get(mark.path, ())]))
        elif skipped := notes.skipped_in(leaf):
            graph.add_node(key, skipped="\n".join(dict.fromkeys(drawing.skipped[path] for path in skipped)))
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


def _rotated(leaf: Leaf, every: list[Row]) -> dict[str, str | int | float]:
    rows = [row for row in every if row.active] or every
    measures = {name: [getattr(row, name) for row in rows] for name in ("rotation", "mean_angle", "angle")}
    return {
        "sites": "\n".join(mark.path for mark in leaf.marks),
        "adapters": "\n".join(dict.fromkeys(row.adapter for row in every)),
        "d": leaf.width,
        "r": leaf.rank,
        **{name: max(values) for name, values in measures.items() if values and not any(map(math.isnan, values))},
    }
