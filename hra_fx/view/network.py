"""The graph of a model for other programs: `to_networkx`, GraphML and DOT with a node for every box, and Mermaid.

The formats are http://graphml.graphdrawing.org, https://graphviz.org/doc/info/lang.html and
https://mermaid.js.org/syntax/flowchart.html, which GitHub draws in a README.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx

from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import ink_on, shorten
from hra_fx.reporting.row import Row, largest
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.opening import Block, Options, opened
from hra_fx.view.subject import name_of
from hra_fx.view.svg import FRAMES, LOOKS
from hra_fx.view.theme import COLORS
from hra_fx.view.tree import Item, Leaf, Scope, joined, module_of, notes, span

#: The attributes of a node that are fields of a leaf.
_FIELDS = ("name", "detail", "kind", "op", "target", "shape", "dtype", "parameters")

#: Graphviz takes minutes for a thousand boxes unless its search is limited.
_LIMITS = "nslimit=1, nslimit1=1, mclimit=0.5"
#: Mermaid's limits on GitHub.
EDGES, CHARACTERS = 500, 50_000
_LETTERS = 48
#: Other characters are written as numbers: quotes, brackets, and anything that could be a directive or an entity.
_PLAIN = re.compile(r"[A-Za-z0-9 ._/,()=+-]")


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
        model: a module, transformed, with PEFT's HRA, plain or folded, a `torch.fx.GraphModule` or a
            `torch.export.ExportedProgram`.
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


def network(drawing: Drawing, heatmap: Heatmap | None = None) -> nx.DiGraph[str]:
    """Convert a drawing to a graph with plain attributes; see `to_networkx`. Heat is the attribute `heat_<name>`."""
    rows: dict[str, list[Row]] = {}
    for row in drawing.rows:
        rows.setdefault(row.path, []).append(row)
    graph: nx.DiGraph[str] = nx.DiGraph(title=drawing.title, facts=drawing.facts)
    for key, leaf in drawing.picture.nodes(data="leaf"):
        graph.add_node(key, module=leaf.place[-1] if leaf.place else "")
        data = graph.nodes[key]
        data.update((name, getattr(leaf, name)) for name in _FIELDS)
        if leaf.marks:
            data["adapted_layers"] = "\n".join(leaf.marks)
        if leaf.marks and heatmap is not None and not math.isnan(heat := heatmap.mean(leaf.marks)):
            data[f"heat_{heatmap.name}"] = heat
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
    names = ("rotation", "mean_angle", "angle") if rows else ()
    measures = {name: largest(getattr(row, name) for row in rows) for name in names}
    adapters = "\n".join(dict.fromkeys(row.adapter for row in every))
    known = {name: value for name, value in measures.items() if not math.isnan(value)}
    return {"adapters": adapters, "d": leaf.width, "r": leaf.rank, **known}


def render_graphml(drawing: Drawing, options: Options) -> bytes:
    """Render the GraphML of a model, or of a part of it: the graph of `to_networkx`, with the heat."""
    part, buffer = collapsed(drawing, options.depth), io.BytesIO()
    heatmap = heatmap_of(part, options.heat) if options.heat else None
    nx.write_graphml(network(part, heatmap), buffer, named_key_ids=True)
    return buffer.getvalue()


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
    picture, box = drawing.picture, dict[str, str]()
    inside: dict[str, list[Leaf]] = {}
    for key, leaf in picture.nodes(data="leaf"):
        box[key] = key if len(leaf.place) <= depth else f"module:{leaf.place[depth]}"
        inside.setdefault(box[key], []).append(leaf)
    part: nx.DiGraph[str] = nx.DiGraph(**picture.graph)
    for name, leaves in inside.items():
        is_open = len(leaves[0].place) <= depth
        part.add_node(name, leaf=leaves[0] if is_open else _module(leaves, depth, picture.graph["classes"]))
    part.add_edges_from((box[a], box[b]) for a, b in picture.edges if box[a] != box[b])
    return replace(drawing, picture=part)


def _module(leaves: list[Leaf], depth: int, classes: dict[str, str]) -> Leaf:
    """Create one leaf for all leaves of a module."""
    call, inner = leaves[0].place[depth], joined(leaves)
    path = module_of(call)
    own = Leaf(name_of(call), classes.get(path, ""), "module", "call_module", path, inner.place[:depth])
    paths = (path, *dict.fromkeys(inner.paths))
    kept = {name: getattr(inner, name) for name in ("marks", "skipped", "trained", "parameters")}
    return replace(own, paths=paths, **kept)


def render_mermaid(drawing: Drawing, options: Options) -> str:
    """Render the Mermaid text of a model, or of a part of it. A text that GitHub does not draw is an error.

    Identical blocks are drawn once, as in the SVG picture. Comments list the adapted layers of each box, because GitHub
    does not show tooltips.
    """
    flow = _Flowchart(heatmap_of(drawing, options.heat))
    flow.inside(opened(drawing.tree(), options.depth, options.focus or ""))
    head = ["flowchart TD", f"  %% {escape(drawing.title)}", f"  %% {escape(drawing.facts)}"]
    text = "\n".join([*head, *_STYLES, *flow.lines, *flow.edges]) + "\n"
    if len(flow.edges) > EDGES or len(text) > CHARACTERS:
        raise VisualizeError(
            f"The Mermaid text has {len(flow.edges):,} edges and {len(text):,} characters; GitHub draws at most "
            f"{EDGES:,} edges and {CHARACTERS:,} characters. Pass a smaller `depth` or a module as `focus`."
        )
    return text


def escape(text: str) -> str:
    """Escape a text for a quoted label or a comment.

    >>> escape('a"b <i>'), escape("%%{init}"), escape("日本")
    ('a#34;b #60;i#62;', '#37;#37;#123;init#125;', '日本')
    """
    return "".join(c if _PLAIN.fullmatch(c) or c >= "\u00a0" else f"#{ord(c)};" for c in text)


@dataclass
class _Flowchart:
    heatmap: Heatmap
    lines: list[str] = field(default_factory=list)
    edges: dict[str, None] = field(default_factory=dict)
    count: int = 0

    def inside(self, block: Block, indent: str = "  ") -> tuple[list[str], list[str]]:
        """Add the parts of a block. Returns the nodes at which edges enter and leave it."""
        ends = [self._part(part, indent) for part in block.parts or ()]
        if not isinstance(block.item, Scope):
            return [], []
        edges = block.item.edges
        pairs = ((source, target) for i, j, _ in edges if i >= 0 for source in ends[i][1] for target in ends[j][0])
        self.edges.update(dict.fromkeys(f"  {source} --> {target}" for source, target in pairs))
        entering = [node for j in sorted({j for i, j, _ in edges if i < 0}) for node in ends[j][0]]
        return entering, [node for i in block.item.outputs for node in ends[i][1]]

    def _part(self, part: Block, indent: str) -> tuple[list[str], list[str]]:
        item, look = part.item, part.look
        self.count += 1
        if part.parts is not None:
            name = f"m{self.count}"
            self.lines.append(f'{indent}subgraph {name}["{_label(item)}"]')
            enter, leave = self.inside(part, indent + "  ")
            self.lines += [f"{indent}end", f"{indent}class {name} {look}"]
            return enter or [name], leave or [name]
        name = f"n{self.count}"
        words, fill = self.heatmap.strip(item)
        extra = [f"{len(item.skipped)} not adapted"] if item.skipped else []
        if item.marks:
            facts = f"{len(item.marks)} adapted" if isinstance(item, Scope) else f"r {item.rank} · d {item.width}"
            extra.insert(0, facts + (f" · {words}" if words else ""))
        opening, closing = {"port": ("([", "])"), "closed": ("[[", "]]")}.get(look, ("[", "]"))
        label = "<br/>".join([_label(item), *map(escape, extra)])
        self.lines.append(f'{indent}{name}{opening}"{label}"{closing}:::{look}')
        if fill:
            self.lines.append(f"{indent}style {name} fill:{fill},color:{ink_on(fill)}")
        if item.marks:  # one line for all layers of a box, because comments also count towards the limits
            paths = " ".join(escape(path).replace(" ", "#32;") for path in item.marks)
            self.lines.append(f"{indent}%% {name}: {paths}")
        return [name], [name]


def _style(look: str, fill: str, line: str, ink: str) -> str:
    """The colors of a look, readable on light and dark pages."""
    dashes = ",stroke-dasharray:4 3" if look in ("eager", "untraced") else ""
    return f"  classDef {look} fill:{COLORS[fill][0]},stroke:{COLORS[line][0]},color:{COLORS[ink][0]}{dashes}"


_STYLES = [
    *(_style(look, *roles) for look, roles in LOOKS.items() if look != "adapted_layer"),
    _style("adapted_layer", "violet-pale", "violet-line", "violet"),
    *(_style(look, fill, line, "ink") for look, (fill, line, _) in FRAMES.items()),
]


def _label(item: Item) -> str:
    """Name, count and class, escaped."""
    count = f" × {item.count}" if item.count > 1 else ""
    detail = item.detail if isinstance(item, Leaf) else item.class_name
    words = [shorten(span(item), _LETTERS) + count, *([shorten(detail, _LETTERS)] if detail else [])]
    return (" · " if isinstance(item, Scope) else "<br/>").join(map(escape, dict.fromkeys(words)))
