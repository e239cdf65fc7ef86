"""The graph of a model for other programs, with one node for every box: `to_networkx`, GraphML and DOT.

The formats are http://graphml.graphdrawing.org and https://graphviz.org/doc/info/lang.html.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx

from hra_fx.reporting.heat import ink_on
from hra_fx.reporting.row import Row, largest
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.opening import Options
from hra_fx.view.subject import name_of
from hra_fx.view.theme import COLORS
from hra_fx.view.tree import Leaf, joined, module_of, notes

#: Graphviz takes minutes for a thousand boxes unless its search is limited.
_LIMITS = "nslimit=1, nslimit1=1, mclimit=0.5"


def to_networkx(model: Any, example_inputs: Any = None) -> nx.DiGraph[str]:
    """Convert a model to a networkx graph with one node for each layer and operation.

    A node includes the parameters and adapters of its layer.

    Every adapted layer is in exactly one node. Attributes are strings and numbers. All nodes have:

    * `name`, `detail` (class and shape of a layer), `kind` (`input`, `output`, `adapted_layer`, `module`, `op`, or
      `eager` for a module that is not traced), `op` (the fx opcode, or `eager`), `target`;
    * `module`: path of the module whose forward contains the node, `""` for the model;
    * `shape` and `dtype` of its value, `""` if unknown (pass `example_inputs`);
    * `parameters`: number of its parameters; a shared parameter counts at the first node that reads it.

    Adapted layers also have `adapted_layers` (their paths, one per line), `adapters`, `d` and `r`. If they can be
    computed, they also have `rotation`, `mean_angle` and `angle` from the report (the largest value of the active
    adapters, or of all adapters if none is active). In an adapted model, nodes of layers without an adapter have
    `skipped` (the reason), and nodes of layers that are trained in full have `trained_in_full` (their paths).

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call if torch.fx cannot trace
            the whole model, or if the call passes optional arguments.

    Returns:
        An acyclic DiGraph. Edges are the flow of values. The graph has the attributes `title` and `facts`.

    Raises:
        VisualizeError: the model has another type, or does not take example inputs.
        AdapterError: `torch.export` is needed for the call, but cannot capture it.

    Example:
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [(data["name"], data.get("r")) for _, data in to_networkx(model).nodes(data=True)]
        [('input', None), ('0', 2), ('1', None), ('output', None)]
    """
    return network(drawing_of(model, example_inputs))


def network(drawing: Drawing) -> nx.DiGraph[str]:
    """Convert a drawing to a graph with plain attributes; see `to_networkx`."""
    rows: dict[str, list[Row]] = {}
    for row in drawing.rows:
        rows.setdefault(row.path, []).append(row)
    graph: nx.DiGraph[str] = nx.DiGraph(title=drawing.title, facts=drawing.facts)
    for key, leaf in drawing.picture.nodes(data="leaf"):
        names = ("name", "detail", "kind", "op", "target", "shape", "dtype", "parameters")
        graph.add_node(
            key, module=leaf.place[-1] if leaf.place else "", **{name: getattr(leaf, name) for name in names}
        )
        if leaf.kind == "adapted_layer" and leaf.marks:
            graph.add_node(key, **_measured(leaf, [row for path in leaf.marks for row in rows.get(path, ())]))
        elif leaf.skipped:
            graph.add_node(key, skipped="\n".join(dict.fromkeys(layer.reason for layer in leaf.skipped)))
        if leaf.trained:
            graph.add_node(key, trained_in_full="\n".join(leaf.trained))
    graph.add_edges_from(drawing.picture.edges)
    return graph


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


def render_graphml(drawing: Drawing, options: Options) -> bytes:
    """Render the GraphML of a model, or of a part of it."""
    buffer = io.BytesIO()
    nx.write_graphml(plain(drawing, options), buffer, named_key_ids=True)
    return buffer.getvalue()


def plain(drawing: Drawing, options: Options) -> nx.DiGraph[str]:
    """The graph of `to_networkx` in a form that GraphML can represent, so that reading the file gives an equal graph.

    Empty and NaN attributes are left out. The values of `options.heat` are in the attribute `heat_<name>`.
    """
    part = collapsed(drawing, options.depth)
    graph, heat = network(part), heatmap_of(part, options.heat)
    for key, leaf in part.picture.nodes(data="leaf"):
        if leaf.marks:
            graph.nodes[key]["adapted_layers"] = "\n".join(leaf.marks)
            if options.heat:
                graph.nodes[key][f"heat_{heat.name}"] = heat.mean(leaf.marks)
    for data in (graph.graph, *(data for _, data in graph.nodes(data=True))):
        for name, value in list(data.items()):
            if value == "" or (isinstance(value, float) and math.isnan(value)):
                del data[name]
    return graph


def render_dot(drawing: Drawing, options: Options) -> str:
    """Render the DOT text of a model, or of a part of it, with modules as clusters."""
    part = collapsed(drawing, options.depth)
    picture, heat = part.picture, heatmap_of(part, options.heat)
    names = {key: f"n{index}" for index, key in enumerate(picture)}
    leaves = [(names[key], leaf) for key, leaf in picture.nodes(data="leaf")]

    def attributes(leaf: Leaf) -> str:
        value, fill = heat.strip(leaf)
        fill = fill or COLORS["violet-pale" if leaf.marks else "card"][0]
        words = dict.fromkeys((leaf.name, leaf.detail, f"r {leaf.rank}" * bool(leaf.rank), value))
        label = quoted(*filter(None, words))
        # A later call of a shared layer does not have marks, and is not named again.
        otherwise = leaf.op if leaf.kind == "adapted_layer" else leaf.target
        tip = quoted(*([*map(heat.line, leaf.marks), *notes(leaf)] or [otherwise]))
        return f'label={label}, tooltip={tip}, fillcolor="{fill}", fontcolor="{ink_on(fill)}"'

    def inside(leaves: Sequence[tuple[str, Leaf]], depth: int = 0) -> Iterator[str]:
        """Render the boxes of one call of a module, and a cluster for each call inside it."""
        inner: dict[str, list[tuple[str, Leaf]]] = {}
        for name, leaf in leaves:
            if len(leaf.place) > depth:
                inner.setdefault(leaf.place[depth], []).append((name, leaf))
            else:
                yield f"{name} [{attributes(leaf)}]"
        for call, members in inner.items():
            title = " · ".join(filter(None, (name_of(call), picture.graph["classes"].get(module_of(call), ""))))
            # Graphviz joins clusters with the same name, so each is named after its first box, which is unique.
            yield f"subgraph cluster_{depth}_{members[0][0]} {{ label={quoted(title)}"
            yield from inside(members, depth + 1)
            yield "}"

    head = f'graph [{_LIMITS}, label={quoted(part.title, part.facts)}]\nnode [shape=box, style="filled,rounded"]'
    edges = (f"{names[source]} -> {names[target]}" for source, target in picture.edges)
    return "\n".join(["digraph {", head, *inside(leaves), *edges, "}"]) + "\n"


def quoted(*lines: str) -> str:
    r"""Join lines in one quoted string, with quotes, backslashes and entities escaped.

    >>> print(quoted('a"b', "\\N &lt;"))
    "a\"b\n\\N &amp;lt;"
    """
    safe = (line.replace("\\", r"\\").replace('"', r"\"").replace("&", "&amp;") for line in lines)
    return '"' + r"\n".join(safe) + '"'


def collapsed(drawing: Drawing, depth: int | None) -> Drawing:
    """A drawing with `depth` levels of modules open (`None` for all). Each module below becomes one box.

    Modules with interleaved calls then depend on each other, so the result may have cycles.
    """
    if depth is None:
        return drawing
    picture = drawing.picture
    inside: dict[str, list[Leaf]] = {}
    box: dict[str, str] = {}
    for key, leaf in picture.nodes(data="leaf"):
        box[key] = key if len(leaf.place) <= depth else f"module:{leaf.place[depth]}"
        inside.setdefault(box[key], []).append(leaf)
    part: Any = nx.DiGraph(**picture.graph)
    for name, leaves in inside.items():
        is_open = len(leaves[0].place) <= depth
        part.add_node(name, leaf=leaves[0] if is_open else _module(leaves, depth, picture.graph["classes"]))
    part.add_edges_from((box[a], box[b]) for a, b in picture.edges if box[a] != box[b])
    return replace(drawing, picture=part)


def _module(leaves: list[Leaf], depth: int, classes: dict[str, str]) -> Leaf:
    """Create one leaf for all leaves of a module."""
    call, inner = leaves[0].place[depth], joined(leaves)
    path = module_of(call)
    return replace(
        inner,
        name=name_of(call),
        detail=classes.get(path, ""),
        kind="module",
        op="call_module",
        target=path,
        place=inner.place[:depth],
        rank=0,
        paths=(path, *dict.fromkeys(inner.paths)),
        shape="",
        dtype="",
    )
