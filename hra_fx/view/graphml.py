"""GraphML (http://graphml.graphdrawing.org), by networkx: every box with plain attributes."""

from __future__ import annotations

import io
import math

import networkx as nx

from hra_fx.view.collapse import collapsed
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.network import network
from hra_fx.view.options import OFF, Options
from hra_fx.view.text import clean


def render(drawing: Drawing, options: Options) -> bytes:
    """The GraphML of a model, or of a part of it.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    buffer = io.BytesIO()
    nx.write_graphml(plain(drawing, options), buffer, named_key_ids=True)
    return buffer.getvalue()


def plain(drawing: Drawing, options: Options) -> nx.DiGraph[str]:
    """The graph of `to_networkx` as GraphML can represent it, so that reading the file gives an equal graph.

    Characters that XML cannot hold become U+FFFD, and in the names of nodes escapes. Attributes that are empty or NaN
    are left out. The values of `options.heat` are in the attribute `heat_<name>`.
    """
    part = collapsed(drawing, options.depth)
    graph, heat = network(part), heatmap_of(part, options.heat or OFF)
    for key, leaf in part.picture.nodes(data="leaf"):
        if leaf.marks:
            graph.nodes[key]["adapted_layers"] = "\n".join(mark.path for mark in leaf.marks)
            if heat.values:
                graph.nodes[key][f"heat_{heat.name}"] = heat.mean(mark.path for mark in leaf.marks)
    for data in (graph.graph, *(data for _, data in graph.nodes(data=True))):
        for name, value in list(data.items()):
            if isinstance(value, str):
                data[name] = "\n".join(clean(line) for line in value.split("\n"))
            if value == "" or (isinstance(value, float) and math.isnan(value)):
                del data[name]
    return nx.relabel_nodes(graph, {key: ascii(key) for key in graph if clean(key) != key})
