"""DOT, for Graphviz (https://graphviz.org/doc/info/lang.html): every box by itself, modules as clusters.

Graphviz takes minutes for a thousand boxes unless its search is limited, so the file has attributes that do that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hra_fx.reporting.colormap import ink_on
from hra_fx.view.annotations import Annotations, annotations_of
from hra_fx.view.collapse import collapsed
from hra_fx.view.describe import name_of
from hra_fx.view.drawing import Drawing
from hra_fx.view.focus import focused
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.options import Options
from hra_fx.view.svg import EDGE, FRAMES, LOOKS, SKIPPED, VIOLET, VIOLET_LINE, VIOLET_PALE
from hra_fx.view.text import clean
from hra_fx.view.tree import Leaf, module_of

#: Limits network simplex and crossing minimization.
_LIMITS = "nslimit=1, nslimit1=1, mclimit=0.5"
_LOOKS = {"input": "port", "output": "port", "eager": "eager"}


def render(drawing: Drawing, options: Options) -> str:
    """The DOT text of a model, or of a part of it, with `options.depth` levels of modules.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    part = collapsed(focused(drawing, options.focus), options.depth)
    picture = part.picture
    names = {key: f"n{index}" for index, key in enumerate(picture)}
    root = _Cluster()
    for key, data in picture.nodes(data=True):
        root.at(data["leaf"].place).leaves.append((names[key], data["leaf"]))
    annotations = annotations_of(part, heatmap_of(part, options.heat))
    lines = [
        f"// {clean(part.facts)}",
        f"digraph {quoted(part.title)} {{",
        f"  graph [{_LIMITS}, label={quoted(part.title)}, labelloc=t, fontname={quoted('sans-serif')}]",
        f'  node [shape=box, style="filled,rounded", fontname={quoted("sans-serif")}, fontsize=11, margin="0.12,0.06"]',
        f'  edge [color="{EDGE}", arrowsize=0.7]',
        *_inside(root, annotations, picture.graph["classes"], "  "),
        *(f"  {names[source]} -> {names[target]}" for source, target in picture.edges),
    ]
    return "\n".join([*lines, "}"]) + "\n"


def quoted(*lines: str) -> str:
    r"""Lines as one quoted string, with quotes, backslashes and entities escaped.

    >>> print(quoted('a"b', "\\N &lt;"))
    "a\"b\n\\N &amp;lt;"
    """
    safe = (clean(line).replace("\\", r"\\").replace('"', r"\"").replace("&", "&amp;") for line in lines)
    return '"' + r"\n".join(safe) + '"'


@dataclass
class _Cluster:
    """A call of a module: the clusters inside it by call, and its own boxes."""

    inner: dict[str, _Cluster] = field(default_factory=dict)
    leaves: list[tuple[str, Leaf]] = field(default_factory=list)

    def at(self, place: tuple[str, ...]) -> _Cluster:
        """The cluster of a place, created if it is missing."""
        cluster = self
        for call in place:
            cluster = cluster.inner.setdefault(call, _Cluster())
        return cluster


def _inside(cluster: _Cluster, annotations: Annotations, classes: dict[str, str], indent: str) -> Iterator[str]:
    for name, leaf in cluster.leaves:
        yield f"{indent}{name} [{_attributes(leaf, annotations)}]"
    fill, line, _ = FRAMES["traced"]
    for call, inner in cluster.inner.items():
        # Graphviz joins clusters of one name, so each is named after its first box, which is unique at its depth.
        yield f"{indent}subgraph cluster_{len(indent)}_{_first(inner)} {{"
        title = " · ".join(filter(None, (name_of(call), classes.get(module_of(call), ""))))
        yield f'{indent}  label={quoted(title)}; style="filled,rounded"; fillcolor="{fill}"; color="{line}"'
        yield from _inside(inner, annotations, classes, indent + "  ")
        yield f"{indent}}}"


def _first(cluster: _Cluster) -> str:
    if cluster.leaves:
        return cluster.leaves[0][0]
    return _first(next(iter(cluster.inner.values())))


def _attributes(leaf: Leaf, annotations: Annotations) -> str:
    value, heat = annotations.strip(leaf)
    look = "trained" if annotations.trained_in(leaf) else _LOOKS.get(leaf.kind, "plain")
    fill, line, ink = LOOKS[look]
    if leaf.marks:
        fill, line, ink = heat or VIOLET_PALE, VIOLET_LINE, ink_on(heat) if heat else VIOLET
    words = [leaf.name, leaf.detail if leaf.detail != leaf.name else ""]
    if leaf.kind == "adapted_layer":
        words.append(f"r {leaf.rank} · d {leaf.width}" if leaf.marks else "same layer, called again")
    elif leaf.marks:
        words.append(f"{len(leaf.marks)} adapted")
    words[-1] += f" · {value}" * bool(value)
    tip = [*(annotations.value(mark.path) for mark in leaf.marks), *annotations.lines(leaf)] or [leaf.target]
    shown = {
        "label": quoted(*filter(None, words)),
        "tooltip": quoted(*tip),
        "class": quoted("adapted_layer" if leaf.marks else "again" if leaf.kind == "adapted_layer" else leaf.kind),
        "fillcolor": quoted(fill),
        "color": quoted(SKIPPED if annotations.skipped_in(leaf) else line),
        "fontcolor": quoted(ink),
    }
    return ", ".join(f"{name}={value}" for name, value in shown.items())
