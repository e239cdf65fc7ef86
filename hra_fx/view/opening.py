"""The part of a model that a picture shows: one module with its inputs and outputs, and the open modules."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from numbers import Integral

import networkx as nx

from hra_fx.errors import VisualizeError
from hra_fx.reporting.report import Report
from hra_fx.view.drawing import Drawing
from hra_fx.view.tree import Item, Leaf, Scope, module_of, signature

#: If no depth is set, modules are opened up to this number of boxes.
BUDGET = 60
#: Modules with at most this many items are opened each time they occur.
_SMALL = 3


def check_options(depth: object, focus: object) -> None:
    """Check the types and values of the options of a picture."""
    if isinstance(depth, bool) or not isinstance(depth, Integral | None) or (depth or 0) < 0:
        raise VisualizeError(f"`depth` must be a non-negative int or None, got {depth!r}.")
    if not isinstance(focus, str | None):
        raise VisualizeError(
            f"`focus` must be a module's name as in model.named_modules(), got {type(focus).__name__}."
        )


@dataclass(frozen=True)
class Block:
    """A box of a picture: a leaf, a closed scope, or an open scope with the blocks inside it (else `None`)."""

    item: Item
    parts: tuple[Block, ...] | None = None

    @property
    def look(self) -> str:
        """The look of the box."""
        if isinstance(self.item, Scope):
            return "closed" if self.parts is None else "untraced" if self.item.eager else "traced"
        if self.item.kind in ("input", "output"):
            return "port"
        if self.item.kind == "adapted_layer":
            return "adapted_layer"
        return "trained" if self.item.trained else "eager" if self.item.kind == "eager" else "plain"


def opened(root: Scope, depth: int | None, focus: str = "") -> Block:
    """The blocks of a model, or of a module in it.

    Args:
        root: the tree of a model, or of a module in it.
        depth: number of open levels, 0 for closed children. `None` opens up to `BUDGET` boxes: outer modules first,
            only the first of several modules that differ only in size, and only modules with adapted layers if there
            are any.
        focus: path of the module.
    """
    readable = _readable(root) if depth is None else set()
    levels = (depth or 0) + len(focus.split(".")) * bool(focus)

    def block(item: Item) -> Block:
        if isinstance(item, Leaf):
            return Block(item)
        is_open = id(item) in readable if depth is None else not item.path or item.path.count(".") < levels
        return Block(item, tuple(map(block, item.items)) if is_open else None)

    return block(root)


def _readable(root: Scope) -> set[int]:
    """The ids of the scopes that are open by default."""
    level, is_open, seen = [root], {id(root)}, set[Hashable]()
    boxes = len(root.items)
    while level:
        inner = [item for scope in level for item in scope.items if isinstance(item, Scope)]
        level = []
        for scope in inner:
            looks, more = signature(replace(scope, count=1), sizes=False), len(scope.items) - 1
            wanted = (scope.marks or not root.marks) and (looks not in seen or len(scope.items) <= _SMALL)
            if wanted and boxes + more <= BUDGET:
                seen.add(looks)
                is_open.add(id(scope))
                level.append(scope)
                boxes += more
    return is_open


def focused(drawing: Drawing, focus: str | None) -> Drawing:
    """The drawing of one module, with a box for each value that enters or leaves it.

    All calls of a shared module are shown. `None` or `""` is the model. A module without boxes is an error.
    """
    if not focus:
        return drawing
    leaves: dict[str, Leaf] = dict(drawing.picture.nodes(data="leaf"))
    inside = {
        key: leaf
        for key, leaf in leaves.items()
        if focus in map(module_of, leaf.place) or focus in leaf.paths or (leaf.kind != "op" and leaf.target == focus)
    }
    if not inside:
        raise VisualizeError(f"`focus`: {_unknown(drawing, focus, leaves.values())}")
    found = drawing.report
    rows = tuple(row for row in found.rows if _within(row.path, focus))
    adapted = {path for leaf in inside.values() for path in leaf.marks}
    facts = f"a part · whole model: {drawing.facts}"
    if found.rows:
        total, parameters = len({row.path for row in found.rows}), sum(row.parameters for row in rows)
        facts = f"{len(adapted)} of {total} adapted layers · {parameters:,} adapter parameters here"
    part = Report(
        rows,
        tuple(layer for layer in found.skipped if _within(layer.path, focus)),
        tuple(path for path in found.trained_in_full if _within(path, focus)),
        tuple(parameter for parameter in found.skipped_parameters if _within(parameter.path, focus)),
    )
    picture = _cut_out(drawing.picture, focus, inside)
    return replace(drawing, title=f"{focus} in {drawing.title}", facts=facts, picture=picture, report=part)


def _within(path: str, focus: str) -> bool:
    return path == focus or path.startswith(f"{focus}.")


def _cut_out(picture: nx.DiGraph[str], focus: str, inside: dict[str, Leaf]) -> nx.DiGraph[str]:
    """The leaves inside, one box for each value from outside, and one box for each value that is read outside."""
    part: nx.DiGraph[str] = nx.DiGraph()
    graph = picture.graph
    part.graph.update(graph)
    part.graph["classes"] = {**graph["classes"], "": graph["classes"].get(focus, "")}
    address = {key: _address(leaf) for key, leaf in picture.nodes(data="leaf")}
    for source in dict.fromkeys(source for key in inside for source in picture.pred[key] if source not in inside):
        name, shape = f"from {address[source]}", picture.nodes[source]["leaf"].shape
        part.add_node(f"from:{source}", leaf=Leaf(name, "", "input", "placeholder", name, (), shape=shape))
        part.add_edges_from(
            (f"from:{source}", key, data) for key, data in picture.succ[source].items() if key in inside
        )
    for key, leaf in inside.items():
        below = (leaf.place[at + 1 :] for at, call in enumerate(leaf.place) if module_of(call) == focus)
        part.add_node(key, leaf=replace(leaf, place=next(below, ())))
        part.add_edges_from((source, key, data) for source, data in picture.pred[key].items() if source in inside)
    for key in inside:
        readers = [reader for reader in picture.succ[key] if reader not in inside]
        if readers:
            more = f" + {len(readers) - 1}" if len(readers) > 1 else ""
            part.add_edge(key, f"to:{key}", **picture.succ[key][readers[0]])
            name = f"to {address[readers[0]]}{more}"
            part.nodes[f"to:{key}"]["leaf"] = Leaf(name, "", "output", "output", name, ())
    return part


def _address(leaf: Leaf) -> str:
    """The path of the module of a leaf, and the name if the leaf is an operation."""
    if leaf.paths or not leaf.place:
        return leaf.target
    return f"{leaf.place[-1]}: {leaf.name}"


def _unknown(drawing: Drawing, focus: str, leaves: Iterable[Leaf]) -> str:
    """Return why a module does not have boxes, with similar names."""
    boxes = {path for leaf in leaves for path in leaf.paths}
    shown = boxes | {module_of(call) for leaf in leaves for call in leaf.place}
    known = drawing.picture.graph["classes"]
    around = [focus[:end] for end in range(len(focus)) if focus[end] == "." and focus[:end] in boxes]
    if focus in known and around:
        return f"{focus!r} is inside {around[-1]!r}, which is drawn as one box. Pass {around[-1]!r}."
    if focus in known:
        return f"{focus!r} has no boxes, because nothing that it computes is drawn. Pass another module."
    near = difflib.get_close_matches(focus, sorted(shown), 3)
    similar = f"; did you mean {' or '.join(map(repr, near))}?" if near else ". See model.named_modules()."
    return f"the model has no module {focus!r}{similar}"
