"""JSON for Google's Model Explorer (https://github.com/google-ai-edge/model-explorer).

The file is two of its documented structures in one. `label` and `graphs` are a graph collection (`graph_builder.py` of
its package): open it as a model. The entry under the name of the graph is node data (`node_data_builder.py`): add the
same file as custom node data, and adapted layers are colored by how far they are rotated.
"""

from __future__ import annotations

import json
import math
from typing import Any

from hra_fx.reporting.colormap import PALETTE, ink_on
from hra_fx.reporting.heat import HEATS
from hra_fx.view.collapse import collapsed
from hra_fx.view.drawing import Drawing
from hra_fx.view.focus import focused
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.annotations import Annotations
from hra_fx.view.options import Options
from hra_fx.view.text import clean
from hra_fx.view.tree import Leaf, module_of

_HEAT = "mean_angle"


def render(drawing: Drawing, options: Options) -> str:
    """The text of a model, or of a part of it; the node data are those of the heat, else mean angles.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    part = collapsed(focused(drawing, options.focus), options.depth)
    name = f"{clean(part.title)}: graph"  # not one of the two other keys, whatever the model is called
    notes = Annotations(None, part.skipped)
    nodes = [_node(part, key, data["leaf"], notes) for key, data in part.picture.nodes(data=True)]
    graph = {"id": name, "nodes": nodes, "groupNodeAttributes": _groups(part)}
    content: dict[str, Any] = {"label": clean(part.title), "graphs": [graph]}
    if part.rows:
        content[name] = _node_data(part, options.heat or _HEAT)
    return json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"


def _node(part: Drawing, key: str, leaf: Leaf, notes: Annotations) -> dict[str, Any]:
    node: dict[str, Any] = {
        "id": key,
        "label": clean(leaf.name),
        "namespace": _namespace(leaf.place),
        "attrs": _pairs(_facts(leaf, notes)),
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
    """What is told of the modules, by namespace; `""` stands for the model."""
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
    """The last part of a path as one level of a namespace, whose levels are set apart by slashes."""
    return clean(call.rpartition(".")[2]).replace("/", "\u2215") or "\u2215"


def _facts(leaf: Leaf, notes: Annotations) -> dict[str, str]:
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
    for index, reason in enumerate(notes.reasons(notes.skipped_in(leaf)), start=1):
        facts["skipped" if index == 1 else f"skipped {index}"] = reason
    return {name: value for name, value in facts.items() if value}


def _pairs(facts: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": name, "value": clean(value)} for name, value in facts.items()]


def _node_data(part: Drawing, name: str) -> dict[str, Any]:
    """The value and colors of every box with adapted layers."""
    heat = heatmap_of(part, name)
    results: dict[str, Any] = {}
    for key, data in part.picture.nodes(data=True):
        marks = data["leaf"].marks
        value = heat.mean(mark.path for mark in marks) if heat and marks else math.nan
        if heat and math.isfinite(value):
            fill = heat.color(value)
            results[key] = {"value": float(f"{value:.6g}"), "bgColor": fill, "textColor": ink_on(fill)}
    stops = [{"stop": index / (len(PALETTE) - 1), "bgColor": fill} for index, fill in enumerate(PALETTE)]
    unit = f" ({HEATS[name].unit})" if HEATS[name].unit else ""
    return {"name": f"{HEATS[name].words}{unit}", "results": results, "gradient": stops}
