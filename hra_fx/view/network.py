"""`to_networkx`: the graph of a model for other programs, with a node for every box."""

from __future__ import annotations

from typing import Any

import networkx as nx

from hra_fx.reporting.row import Row, largest
from hra_fx.view.drawing import drawing_of
from hra_fx.view.tree import Leaf

#: The attributes of a node that are fields of a leaf.
_FIELDS = ("name", "detail", "kind", "op", "target", "shape", "dtype", "parameters")


def to_networkx(model: Any, example_inputs: Any = None) -> nx.DiGraph[str]:
    """Convert a model to a networkx graph with one node for each layer and operation.

    Every adapted layer is in exactly one node. Attributes are strings and numbers. All nodes have:

    * `name`, `detail` (class and shape of a layer), `kind` (`input`, `output`, `adapted_layer`, `module`, `op`, or
      `eager` for a module that is not traced), `op` (the fx opcode, or `eager`), `target`;
    * `module`: path of the module whose forward contains the node, `""` for the model;
    * `shape` and `dtype` of its value, `""` if unknown (pass `example_inputs`);
    * `parameters`: number of its parameters; a shared parameter counts at the first node that reads it.

    Adapted layers also have `adapted_layers` (their paths, one per line), `adapters`, `d` and `r`. If they can be
    computed, they also have `mean_angle` and `angle` from the report (the largest value of the active adapters, or of
    all adapters if none is active). In an adapted model, nodes of layers without an adapter have `skipped` (the
    reason), and nodes of layers that are trained in full have `trained_in_full` (their paths).

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a
            `torch.export.ExportedProgram`.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call if torch.fx cannot trace
            the whole model, or if the call passes optional arguments.

    Returns:
        An acyclic DiGraph. Edges are the flow of values. The graph has the attributes `title` and `facts`. For Gephi
        and yEd, write it with `networkx.write_graphml(graph, file, named_key_ids=True)`.

    Raises:
        VisualizeError: the model has another type, or does not take example inputs.
        AdapterError: `example_inputs` is not a tensor, a tuple or a dict.

    Example:
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [(data["name"], data.get("r")) for _, data in to_networkx(model).nodes(data=True)]
        [('input', None), ('0', 2), ('1', None), ('output', None)]
    """
    drawing = drawing_of(model, example_inputs)
    rows: dict[str, list[Row]] = {}
    for row in drawing.report.rows:
        rows.setdefault(row.path, []).append(row)
    graph: nx.DiGraph[str] = nx.DiGraph(title=drawing.title, facts=drawing.facts)
    for key, leaf in drawing.picture.nodes(data="leaf"):
        graph.add_node(key, module=leaf.place[-1] if leaf.place else "")
        data = graph.nodes[key]
        data.update((name, getattr(leaf, name)) for name in _FIELDS)
        if leaf.marks:
            data["adapted_layers"] = "\n".join(leaf.marks)
        if leaf.marks and leaf.kind == "adapted_layer":
            data |= _measured(leaf, [row for path in leaf.marks for row in rows.get(path, ())])
        elif leaf.skipped:
            data["skipped"] = "\n".join(dict.fromkeys(layer.reason for layer in leaf.skipped))
        if leaf.trained:
            data["trained_in_full"] = "\n".join(leaf.trained)
    graph.add_edges_from(drawing.picture.edges)
    return graph


def _measured(leaf: Leaf, every: list[Row]) -> dict[str, str | int | float]:
    rows = [row for row in every if row.active] or every
    values = {name: [getattr(row, name) for row in rows] for name in ("mean_angle", "angle")}
    adapters = "\n".join(dict.fromkeys(row.adapter for row in every))
    known = {name: largest(own) for name, own in values.items() if own and None not in own}
    return {"adapters": adapters, "d": leaf.width, "r": leaf.rank, **known}
