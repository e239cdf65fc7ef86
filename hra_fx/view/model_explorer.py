"""JSON for Google's Model Explorer (https://github.com/google-ai-edge/model-explorer).

The file holds two of its documented structures. `label` and `graphs` are a graph collection (`graph_builder.py` of its
package): open the file as a model. The entry under the name of the graph is node data (`node_data_builder.py`): add the
same file as custom node data to color adapted layers by how far they are rotated.
"""

from __future__ import annotations

import json
import math
from typing import Any

from hra_fx.reporting.colormap import PALETTE, ink_on
from hra_fx.reporting.heat import HEATS, default_heat
from hra_fx.view.collapse import collapsed
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.options import OFF, Options
from hra_fx.view.text import clean
from hra_fx.view.tree import Leaf, module_of, notes


def render(drawing: Drawing, options: Options) -> str:
    """The JSON of a model, or of a part of it. Node data show `options.heat`, by default the change of the weight.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    part = collapsed(drawing, options.depth)
    name = f"{clean(part.title)}: graph"  # differs from the two other keys for every name of a model
    nodes = [_node(part, key, data["leaf"]) for key, data in part.picture.nodes(data=True)]
    graph = {"id": name, "nodes": nodes, "groupNodeAttributes": _groups(part)}
    content: dict[str, Any] = {"label": clean(part.title), "graphs": [graph]}
    if part.rows and options.heat != OFF:
        content[name] = _node_data(part, options.heat or default_heat(part.rows))
    return json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"


def _node(part: Drawing, key: str, leaf: Leaf) -> dict[str, Any]:
    node: dict[str, Any] = {
        "id": key,
        "label": clean(leaf.name),
        "namespace": _namespace(leaf.place),
        "attrs": _pairs(_facts(leaf)),
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, source in enumerate(part.picture.pred[key])
        ],
    }
    if leaf.shape:
        shape = f"{leaf.dtype}[{leaf.shape.replace('×', ',')}]"
        node["outputsMetadata"] = [{"id": "0", "attrs": _pairs({"tensor_shape": shape})}]
    return node


def _groups(part: Drawing) -> dict[str, dict[str, str]]:
    """The attributes of modules by namespace; `""` is the model."""
    groups = {"": {"facts": clean(part.facts)}}
    for _, leaf in part.picture.nodes(data="leaf"):
        for end, call in enumerate(leaf.place, start=1):
            path = module_of(call)
            facts = {"module": clean(path), "class": clean(part.picture.graph["classes"].get(path, ""))}
            groups.setdefault(_namespace(leaf.place[:end]), {name: value for name, value in facts.items() if value})
    return groups


def _namespace(place: tuple[str, ...]) -> str:
    return "/".join(map(_component, place))


def _component(call: str) -> str:
    """The last part of a path as one level of a namespace; slashes separate levels."""
    return clean(call.rpartition(".")[2]).replace("/", "\u2215") or "\u2215"


def _facts(leaf: Leaf) -> dict[str, str]:
    facts = {"target": leaf.target, "op": leaf.op, "detail": leaf.detail}
    if leaf.parameters:
        facts["parameters"] = str(leaf.parameters)
    if leaf.kind == "adapted_layer":
        facts |= {"rank": str(leaf.rank), "vector length": str(leaf.width)}
    for index, mark in enumerate(leaf.marks):
        number = f" {index + 1}" if len(leaf.marks) > 1 else ""
        facts[f"adapted layer{number}"] = mark.path
        if mark.rotation is not None:
            facts[f"|Q - I|{number}"] = f"{mark.rotation:.6g}"
    for index, line in enumerate(notes(leaf), start=1):
        facts["not adapted" if index == 1 else f"not adapted {index}"] = line
    return {name: value for name, value in facts.items() if value}


def _pairs(facts: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": name, "value": clean(value)} for name, value in facts.items()]


def _node_data(part: Drawing, name: str) -> dict[str, Any]:
    """Values and colors of the boxes with adapted layers."""
    heat = heatmap_of(part, name)
    results: dict[str, Any] = {}
    for key, data in part.picture.nodes(data=True):
        marks = data["leaf"].marks
        value = heat.mean(mark.path for mark in marks)
        if math.isfinite(value):
            fill = heat.color(value)
            results[key] = {"value": float(f"{value:.6g}"), "bgColor": fill, "textColor": ink_on(fill)}
    stops = [{"stop": index / (len(PALETTE) - 1), "bgColor": fill} for index, fill in enumerate(PALETTE)]
    unit = f" ({HEATS[name].unit})" if HEATS[name].unit else ""
    return {"name": f"{HEATS[name].words}{unit}", "results": results, "gradient": stops}
