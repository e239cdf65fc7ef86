"""Mermaid text (https://mermaid.js.org/syntax/flowchart.html), which GitHub draws in a README.

Identical blocks are drawn once, as in the SVG picture. Comments list the adapted layers of each box, because GitHub
does not show tooltips.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import ink_on, shorten
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.opening import Block, Options, opened
from hra_fx.view.svg import FRAMES, LOOKS
from hra_fx.view.theme import COLORS
from hra_fx.view.tree import Item, Leaf, Scope, span

#: Mermaid's limits on GitHub.
EDGES, CHARACTERS = 500, 50_000
_LETTERS = 48
#: Other characters are written as numbers: quotes, brackets, and anything that could be a directive or an entity.
_PLAIN = re.compile(r"[A-Za-z0-9 ._/,()=+-]")


def render(drawing: Drawing, options: Options) -> str:
    """Render the Mermaid text of a model, or of a part of it. Too large a text is an error with a depth that fits."""
    heatmap, tree, focus = heatmap_of(drawing, options.heat), drawing.tree(), options.focus or ""
    text, edges = _text(drawing, opened(tree, options.depth, focus), heatmap)
    if _fits(text, edges):
        return text
    levels = max(len(leaf.place) for _, leaf in drawing.picture.nodes(data="leaf"))
    smaller = reversed(range(min(options.depth or 0, levels)))
    fitting = next((depth for depth in smaller if _fits(*_text(drawing, opened(tree, depth, focus), heatmap))), None)
    fix = "Pass the path of a module as `focus`, or write an .svg." if fitting is None else f"`depth={fitting}` fits."
    asked = f"`depth={options.depth}` gives" if options.depth is not None else "The smallest Mermaid text has"
    raise VisualizeError(
        f"{asked} {edges:,} edges and {len(text):,} characters; GitHub draws at most {EDGES:,} edges and "
        f"{CHARACTERS:,} characters. {fix}"
    )


def _fits(text: str, edges: int) -> bool:
    return edges <= EDGES and len(text) <= CHARACTERS


def escape(text: str) -> str:
    """Escape a text for a quoted label or a comment.

    >>> escape('a"b <i>'), escape("%%{init}"), escape("日本")
    ('a#34;b #60;i#62;', '#37;#37;#123;init#125;', '日本')
    """
    return "".join(c if _PLAIN.fullmatch(c) or c >= "\u00a0" else f"#{ord(c)};" for c in text)


def _text(drawing: Drawing, block: Block, heatmap: Heatmap) -> tuple[str, int]:
    """Render the text of a block, and count its edges."""
    flow = _Flowchart(heatmap)
    flow.inside(block)
    head = ["flowchart TD", f"  %% {escape(drawing.title)}", f"  %% {escape(drawing.facts)}"]
    return "\n".join([*head, *flow.lines, *flow.edges, *flow.styles()]) + "\n", len(flow.edges)


@dataclass
class _Flowchart:
    heatmap: Heatmap
    lines: list[str] = field(default_factory=list)
    edges: dict[str, None] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    fills: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def inside(self, block: Block, indent: str = "  ") -> tuple[list[str], list[str]]:
        """Add the parts of a block. Returns the nodes at which edges enter and leave it."""
        ends = [self._part(part, indent) for part in block.parts or ()]
        if not isinstance(block.item, Scope):
            return [], []
        pairs = ((source, target) for i, j in block.item.edges for source in ends[i][1] for target in ends[j][0])
        self.edges.update(dict.fromkeys(f"  {source} --> {target}" for source, target in pairs))
        entering = [node for i in block.item.inputs for node in ends[i][0]]
        return entering, [node for i in block.item.outputs for node in ends[i][1]]

    def _name(self, letter: str, look: str) -> str:
        self.count += 1
        self.classes.setdefault(look, []).append(f"{letter}{self.count}")
        return f"{letter}{self.count}"

    def _part(self, part: Block, indent: str) -> tuple[list[str], list[str]]:
        item, look = part.item, part.look
        if part.parts is not None:
            name = self._name("m", look)
            self.lines.append(f'{indent}subgraph {name}["{_label(item)}"]')
            enter, leave = self.inside(part, indent + "  ")
            self.lines.append(f"{indent}end")
            return enter or [name], leave or [name]
        name = self._name("n", look)
        words, fill = self.heatmap.strip(item)
        extra = [f"{len(item.skipped)} not adapted"] if item.skipped else []
        if item.marks:
            facts = f"{len(item.marks)} adapted" if isinstance(item, Scope) else f"r {item.rank} · d {item.width}"
            extra.insert(0, facts + (f" · {words}" if words else ""))
        opening, closing = {"port": ("([", "])"), "closed": ("[[", "]]")}.get(look, ("[", "]"))
        if fill:
            self.fills[name] = fill
        label = "<br/>".join([_label(item), *map(escape, extra)])
        self.lines.append(f'{indent}{name}{opening}"{label}"{closing}')
        if item.marks:  # one line for all layers of a box, because comments also count towards the limits
            self.lines.append(
                f"{indent}%% {name}: {' '.join(escape(path).replace(' ', '#32;') for path in item.marks)}"
            )
        return [name], [name]

    def styles(self) -> Iterator[str]:
        """The colors of boxes, readable on light and dark pages."""
        for look, names in self.classes.items():
            fill, line, ink = (COLORS[role][0] for role in _COLORS[look])
            dashes = ",stroke-dasharray:4 3" if look in ("eager", "untraced") else ""
            yield f"  classDef {look} fill:{fill},stroke:{line},color:{ink}{dashes}"
            yield f"  class {','.join(names)} {look}"
        for name, fill in self.fills.items():
            yield f"  style {name} fill:{fill},color:{ink_on(fill)}"


_COLORS = {
    **LOOKS,
    "adapted_layer": ("violet-pale", "violet-line", "violet"),
    **{look: (fill, line, "ink") for look, (fill, line, _) in FRAMES.items()},
}


def _label(item: Item) -> str:
    """Name, count and class, escaped."""
    count = f" × {item.count}" if item.count > 1 else ""
    detail = item.detail if isinstance(item, Leaf) else item.class_name
    words = [shorten(span(item), _LETTERS) + count, *([shorten(detail, _LETTERS)] if detail else [])]
    return (" · " if isinstance(item, Scope) else "<br/>").join(map(escape, dict.fromkeys(words)))
