"""`to_networkx`: the graph of a model for other programs, with a node for every box."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx

from hra_fx.view.drawing import drawing_of

#: The attributes of a node that are fields of a leaf.
_FIELDS = ("name", "detail", "kind", "target", "shape")


def to_networkx(model: Any, example_inputs: Any = None) -> nx.DiGraph[str]:
    """Convert a model to a networkx graph with one node for each layer and operation.

    Every adapted layer is in exactly one node. Attributes are strings and numbers. All nodes have:

    * `name`, `detail` (class and shape of a layer), `target`, and `kind`: `input`, `output`, `adapted_layer`, `module`,
      `op`, or `eager` for a module that is not traced;
    * `module`: path of the module whose forward contains the node, `""` for the model;
    * `shape` of its value, `""` if unknown (pass `example_inputs`).

    Adapted layers also have `adapted_layers` (their paths, one per line), `d`, `r` (of the active adapters) and, if it
    can be computed, `weight_change`, the largest of the active adapters. In an adapted model, layers without an adapter
    have `skipped` (the reason), and layers that are trained in full have `trained_in_full` (their paths).

    Args:
        model: a module, transformed, plain or folded, or a `torch.fx.GraphModule`.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call if torch.fx cannot trace
            the whole model, or if the call passes optional arguments.

    Returns:
        An acyclic DiGraph. Edges are the flow of values. The graph has the attributes `title` and `facts`. For Gephi
        and yEd, write it with `networkx.write_graphml(graph, file, named_key_ids=True)`.

    Raises:
        VisualizeError: the model has another type.
        AdapterError: `example_inputs` is not a tensor, a tuple or a dict.

    Example:
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [(data["name"], data.get("r")) for _, data in to_networkx(model).nodes(data=True)]
        [('input', None), ('0', 2), ('1', None), ('output', None)]
    """
    drawing = drawing_of(model, example_inputs)
    graph: nx.DiGraph[str] = nx.DiGraph(title=drawing.title, facts=drawing.facts)
    for key, leaf in drawing.picture.nodes(data="leaf"):
        data = {name: getattr(leaf, name) for name in _FIELDS}
        data["module"] = leaf.place[-1] if leaf.place else ""
        if leaf.marks:
            data["adapted_layers"] = "\n".join(leaf.marks)
            data |= {"d": leaf.width, "r": leaf.rank}
            changes = [drawing.changes[path] for path in leaf.marks]
            data |= {} if any(map(math.isnan, changes)) else {"weight_change": max(changes)}
        if leaf.skipped:
            data["skipped"] = "\n".join(dict.fromkeys(layer.reason for layer in leaf.skipped))
        if leaf.trained:
            data["trained_in_full"] = "\n".join(leaf.trained)
        graph.add_node(key, **data)
    graph.add_edges_from(drawing.picture.edges)
    return graph
