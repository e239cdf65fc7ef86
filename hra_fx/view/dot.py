"""DOT, for Graphviz (https://graphviz.org/doc/info/lang.html): every box by itself, modules as clusters.

Graphviz takes minutes for a thousand boxes unless its search is limited, so the file has attributes that do that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hra_fx.reporting.colormap import ink_on
from hra_fx.view.collapse import collapsed
from hra_fx.view.describe import name_of
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.options import Options
from hra_fx.view.svg import FRAMES, LOOKS
from hra_fx.view.text import clean
from hra_fx.view.theme import light
from hra_fx.view.tree import Leaf, module_of, notes

#: Limits network simplex and crossing minimization.
_LIMITS = "nslimit=1, nslimit1=1, mclimit=0.5"
_LOOKS = {"input": "port", "output": "port", "eager": "eager"}


def render(drawing: Drawing, options: Options) -> str:
    """The DOT text of a model, or of a part of it, with `options.depth` levels of modules.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    part = collapsed(drawing, options.depth)
    picture = part.picture
    names = {key: f"n{index}" for index, key in enumerate(picture)}
    leaves = [(names[key], leaf) for key, leaf in picture.nodes(data="leaf")]
    heatmap = heatmap_of(part, options.heat)
    lines = [
        f"// {clean(part.facts)}",
        f"digraph {quoted(part.title)} {{",
        f"  graph [{_LIMITS}, label={quoted(part.title)}, labelloc=t, fontname={quoted('sans-serif')}]",
        f'  node [shape=box, style="filled,rounded", fontname={quoted("sans-serif")}, fontsize=11, margin="0.12,0.06"]',
        f'  edge [color="{light("edge")}", arrowsize=0.7]',
        *_inside(leaves, heatmap, picture.graph["classes"]),
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


def _inside(
    leaves: Sequence[tuple[str, Leaf]], heatmap: Heatmap, classes: Mapping[str, str], depth: int = 0
) -> Iterator[str]:
    """The boxes of one call of a module, and a cluster for each call inside it."""
    indent = "  " * (depth + 1)
    inner: dict[str, list[tuple[str, Leaf]]] = {}
    for name, leaf in leaves:
        if len(leaf.place) > depth:
            inner.setdefault(leaf.place[depth], []).append((name, leaf))
        else:
            yield f"{indent}{name} [{_attributes(leaf, heatmap)}]"
    fill, line = map(light, FRAMES["traced"][:2])
    for call, members in inner.items():
        # Graphviz joins clusters of one name, so each is named after its first box, which is unique at its depth.
        yield f"{indent}subgraph cluster_{depth}_{members[0][0]} {{"
        title = " · ".join(filter(None, (name_of(call), classes.get(module_of(call), ""))))
        yield f'{indent}  label={quoted(title)}; style="filled,rounded"; fillcolor="{fill}"; color="{line}"'
        yield from _inside(members, heatmap, classes, depth + 1)
        yield f"{indent}}}"


def _attributes(leaf: Leaf, heatmap: Heatmap) -> str:
    value, heat = heatmap.strip(leaf)
    look = "trained" if leaf.trained else _LOOKS.get(leaf.kind, "plain")
    fill, line, ink = map(light, LOOKS[look])
    if leaf.marks:
        fill, line, ink = map(light, ("violet-pale", "violet-line", "violet"))
    if heat:
        fill, ink = heat, ink_on(heat)
    if leaf.skipped:
        line = light("red-line" if leaf.refused else "skipped")
    words = [leaf.name, leaf.detail if leaf.detail != leaf.name else ""]
    if leaf.kind == "adapted_layer":
        words.append(f"r {leaf.rank} · d {leaf.width}" if leaf.marks else "same layer, called again")
    elif leaf.marks:
        words.append(f"{len(leaf.marks)} adapted")
    words[-1] += f" · {value}" * bool(value)
    tip = [*(heatmap.line(mark.path) for mark in leaf.marks), *notes(leaf)] or [leaf.target]
    shown = {
        "label": quoted(*filter(None, words)),
        "tooltip": quoted(*tip),
        "class": quoted("adapted_layer" if leaf.marks else "again" if leaf.kind == "adapted_layer" else leaf.kind),
        "fillcolor": quoted(fill),
        "color": quoted(line),
        "fontcolor": quoted(ink),
    }
    return ", ".join(f"{name}={value}" for name, value in shown.items())
