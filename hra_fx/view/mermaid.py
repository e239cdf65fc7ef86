"""Mermaid text (https://mermaid.js.org/syntax/flowchart.html), which GitHub draws in a README.

Blocks that look alike are drawn once, as on the page. Which adapted layers a box stands for is told in comments, since
GitHub shows no tooltips.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hra_fx.errors import VisualizeError
from hra_fx.view.drawing import Drawing
from hra_fx.view.focusing import focused
from hra_fx.view.heat import heating, ink_on
from hra_fx.view.notes import Notes
from hra_fx.view.options import Options
from hra_fx.view.panels import BUDGET, Block, opened
from hra_fx.view.svg import FRAMES, INK, LOOKS, VIOLET, VIOLET_LINE, VIOLET_PALE
from hra_fx.view.text import clean, shorten
from hra_fx.view.tree import Item, Leaf, Scope, span

#: What GitHub's Mermaid draws at most.
EDGES, CHARACTERS = 500, 50_000
_LETTERS = 48
#: All else is written as its number: quotes and brackets, and what Mermaid could take for an instruction or an entity.
_PLAIN = re.compile(r"[A-Za-z0-9 ._/,()=+-]")


def render(drawing: Drawing, options: Options) -> str:
    """The text of a model, or of a part of it.

    Without a depth, as many levels are opened as a reader can take in at once.

    Raises:
        VisualizeError: the options do not fit the model, or Mermaid's limits are exceeded; the message names the depth
            that would fit.
    """
    part = focused(drawing, options.focus)
    heat, tree, focus = heating(part, options.heat), part.tree(), options.focus or ""
    depths = range(_deepest(tree) + 1)
    blocks = [opened(tree, depth, focus).block for depth in depths]
    readable = [depth for depth in depths if len(list(blocks[depth].boxes())) <= BUDGET]
    chosen = max(readable, default=0) if options.depth is None else min(options.depth, depths[-1])
    notes = Notes(heat, part.missed)
    text, edges = _text(part, blocks[chosen], notes)
    if edges <= EDGES and len(text) <= CHARACTERS:
        return text
    fitting = [depth for depth in depths[:chosen] if _fits(part, blocks[depth], notes)]
    asked = f"depth: {options.depth} gives" if options.depth is not None else "path: the smallest Mermaid text has"
    way_out = f"depth={max(fitting)} fits." if fitting else "Give the path of a module as focus, or write an .svg."
    raise VisualizeError(
        f"{asked} {edges:,} edges and {len(text):,} characters, and GitHub draws Mermaid up to {EDGES:,} edges and "
        f"{CHARACTERS:,} characters. {way_out}"
    )


def escape(text: str) -> str:
    """A text as it stands in a quoted label or a comment.

    >>> escape('a"b <i>'), escape("%%{init}"), escape("日本")
    ('a#34;b #60;i#62;', '#37;#37;#123;init#125;', '日本')
    """
    return "".join(c if _PLAIN.fullmatch(c) or c >= "\u00a0" else f"#{ord(c)};" for c in clean(text))


def _deepest(item: Item) -> int:
    """How many levels of modules can be opened: the length of the longest path of a scope."""
    if isinstance(item, Leaf):
        return 0
    return max([len(item.path.split(".")) * bool(item.path), *map(_deepest, item.items)])


def _fits(part: Drawing, block: Block, notes: Notes) -> bool:
    text, edges = _text(part, block, notes)
    return edges <= EDGES and len(text) <= CHARACTERS


def _text(part: Drawing, block: Block, notes: Notes) -> tuple[str, int]:
    """The text of a block, and how many edges it has."""
    flow = _Flowchart(notes)
    lines = ["flowchart TD", f"  %% {escape(part.title)}", f"  %% {escape(part.facts)}", *flow.inside(block, "  ")]
    lines += [f"  {source} --> {target}" for source, target in flow.edges]
    return "\n".join([*lines, *flow.styles()]) + "\n", len(flow.edges)


@dataclass
class _Flowchart:
    notes: Notes
    edges: dict[tuple[str, str], None] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    fills: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def inside(self, block: Block, indent: str) -> Iterator[str]:
        """The lines of an open block's parts; its edges are kept for later."""
        names: list[str] = []
        for part in block.parts or ():
            self.count += 1
            name = f"m{self.count}" if part.parts is not None else f"n{self.count}"
            names.append(name)
            yield from self._part(part, name, indent)
        if isinstance(block.item, Scope):
            self.edges.update(((names[i], names[j]), None) for i, j in block.item.edges)

    def _part(self, part: Block, name: str, indent: str) -> Iterator[str]:
        item = part.item
        look = _look(part)
        self.classes.setdefault(look, []).append(name)
        if part.parts is not None:
            yield f'{indent}subgraph {name}["{_label(item)}"]'
            yield from self.inside(part, indent + "  ")
            yield f"{indent}end"
            return
        words, fill = self.notes.strip(item)
        missed = self.notes.missed_in(item)
        extra = [*_facts(item, words), *([f"{len(missed)} without adapter"] if missed else [])]
        opening, closing = ("([", "])") if look == "port" else ("[[", "]]") if look == "closed" else ("[", "]")
        yield f'{indent}{name}{opening}"{"<br/>".join([_label(item), *map(escape, extra)])}"{closing}'
        yield from (f"{indent}%% {name}: {escape(mark.path)}" for mark in item.marks)
        if fill:
            self.fills[name] = fill

    def styles(self) -> Iterator[str]:
        """The colours of boxes; they are readable on a light page and on a dark one."""
        for look, names in self.classes.items():
            fill, line, ink = _COLOURS[look]
            dashes = ",stroke-dasharray:4 3" if look in ("eager", "python") else ""
            yield f"  classDef {look} fill:{fill},stroke:{line},color:{ink}{dashes}"
            yield f"  class {','.join(names)} {look}"
        for name, fill in self.fills.items():
            yield f"  style {name} fill:{fill},color:{ink_on(fill)}"


_COLOURS = {
    **LOOKS,
    "site": (VIOLET_PALE, VIOLET_LINE, VIOLET),
    **{look: (fill, line, INK) for look, (fill, line, _) in FRAMES.items()},
}


def _look(part: Block) -> str:
    """How a block is drawn, by the names of the page."""
    item = part.item
    if isinstance(item, Scope):
        return "closed" if part.parts is None else "python" if item.eager else "captured"
    return {"input": "port", "output": "port", "site": "site", "eager": "eager"}.get(item.kind, "plain")


def _label(item: Item) -> str:
    """Name, count and class, escaped."""
    count = f" × {item.count}" if item.count > 1 else ""
    detail = item.detail if isinstance(item, Leaf) else item.class_name
    words = [shorten(clean(span(item)), _LETTERS) + count, *([shorten(clean(detail), _LETTERS)] if detail else [])]
    return (" · " if isinstance(item, Scope) else "<br/>").join(map(escape, dict.fromkeys(words)))


def _facts(item: Item, turned: str) -> list[str]:
    """A line about reflections."""
    if not item.marks:
        return []
    if isinstance(item, Scope):
        words = f"{len(item.marks)} site" + "s" * (len(item.marks) > 1)
    else:
        words = f"r {item.rank} · d {item.width}"
    return [words + (f" · {turned}" if turned else "")]
