"""GraphML (http://graphml.graphdrawing.org), by networkx: every box with plain attributes."""

from __future__ import annotations

import io
import math

import networkx as nx

from hra_fx.view.collapse import collapsed
from hra_fx.view.drawing import Drawing
from hra_fx.view.focus import focused
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.network import network
from hra_fx.view.options import Options
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

    Characters that XML cannot hold become U+FFFD, and attributes that are empty or NaN are left out. The values of
    `options.heat` are in the attribute `heat_<name>`.
    """
    part = collapsed(focused(drawing, options.focus), options.depth)
    graph, heat = network(part), heatmap_of(part, options.heat)
    for key, leaf in part.picture.nodes(data="leaf"):
        if leaf.marks:
            graph.nodes[key]["adapted_layers"] = "\n".join(mark.path for mark in leaf.marks)
            if heat is not None:
                graph.nodes[key][f"heat_{heat.name}"] = heat.mean(mark.path for mark in leaf.marks)
    names = _distinct(list(graph))
    written: nx.DiGraph[str] = nx.DiGraph(**_held(graph.graph))
    written.add_nodes_from((names[key], _held(data)) for key, data in graph.nodes(data=True))
    written.add_edges_from((names[source], names[target]) for source, target in graph.edges)
    return written


def _held(attributes: dict[str, str | int | float]) -> dict[str, str | int | float]:
    held: dict[str, str | int | float] = {}
    for name, value in attributes.items():
        if isinstance(value, str):
            value = "\n".join(clean(line) for line in value.split("\n"))
        if value != "" and not (isinstance(value, float) and math.isnan(value)):
            held[name] = value
    return held


def _distinct(keys: list[str]) -> dict[str, str]:
    """A unique name for every node: its key, with a number appended where two are equal."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        name = base = clean(key)
        number = 2
        while name in taken:
            name, number = f"{base} {number}", number + 1
        taken.add(name)
        names[key] = name
    return names
