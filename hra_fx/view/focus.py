"""Create a drawing of one module, with a box for each value that enters or leaves it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

import networkx as nx

from hra_fx.errors import VisualizeError
from hra_fx.view.drawing import Drawing
from hra_fx.view.tree import Leaf, module_of, prefixes

_SHOWN = 3


def focused(drawing: Drawing, focus: str | None) -> Drawing:
    """Create the drawing of one module.

    Args:
        drawing: the drawing of the model.
        focus: qualified name of the module; `None` or `""` for the model. All calls of a shared module are shown.

    Raises:
        VisualizeError: the module does not exist or does not have boxes.
    """
    if not focus:
        return drawing
    leaves: dict[str, Leaf] = {key: data["leaf"] for key, data in drawing.picture.nodes(data=True)}
    inside = {key: leaf for key, leaf in leaves.items() if _is_inside(leaf, focus)}
    if not inside:
        raise VisualizeError(f"`focus`: {_unknown(drawing, focus, leaves.values())}")
    rows = tuple(row for row in drawing.rows if _within(row.path, focus))
    skipped = {path: why for path, why in drawing.skipped.items() if _within(path, focus)}
    adapted = {path for leaf in inside.values() for path in leaf.marks}
    parameters = sum(row.parameters for row in rows)
    facts = f"a part · whole model: {drawing.facts}"
    if drawing.rows:
        total = len({row.path for row in drawing.rows})
        facts = f"{len(adapted)} of {total} adapted layers · {parameters:,} adapter parameters here"
    return replace(
        drawing,
        title=f"{focus} in {drawing.title}",
        facts=facts,
        picture=_cut_out(drawing.picture, focus, inside),
        rows=rows,
        skipped=skipped,
        refused=drawing.refused & skipped.keys(),
        trained_in_full=tuple(path for path in drawing.trained_in_full if _within(path, focus)),
    )


def _within(path: str, focus: str) -> bool:
    return path == focus or path.startswith(f"{focus}.")


def _is_inside(leaf: Leaf, focus: str) -> bool:
    return focus in map(module_of, leaf.place) or focus in leaf.paths or (leaf.kind != "op" and leaf.target == focus)


def _cut_out(picture: nx.DiGraph[str], focus: str, inside: dict[str, Leaf]) -> nx.DiGraph[str]:
    """The leaves inside, one box for each value from outside, and one box for each value that is read outside."""
    part: nx.DiGraph[str] = nx.DiGraph()
    graph = picture.graph
    traced = not graph["traced"].isdisjoint(["", *prefixes(focus)])
    below = {path for path in graph["traced"] if path.startswith(f"{focus}.")}
    part.graph.update(graph, traced=frozenset(below | ({""} if traced else set())))
    part.graph["classes"] = {**graph["classes"], "": graph["classes"].get(focus, "")}
    address = {key: _address(leaf) for key, leaf in picture.nodes(data="leaf")}
    for source in dict.fromkeys(source for key in inside for source in picture.pred[key] if source not in inside):
        name = f"from {address[source]}"
        part.add_node(f"from:{source}", leaf=Leaf(name, "", "input", "placeholder", name, ()))
        part.add_edges_from((f"from:{source}", key) for key in picture.succ[source] if key in inside)
    for key, leaf in inside.items():
        part.add_node(key, leaf=replace(leaf, place=_below(leaf.place, focus)))
        part.add_edges_from((source, key) for source in picture.pred[key] if source in inside)
    for key in inside:
        readers = [reader for reader in picture.succ[key] if reader not in inside]
        if readers:
            more = f" + {len(readers) - 1}" if len(readers) > 1 else ""
            part.add_edge(key, f"to:{key}")
            name = f"to {address[readers[0]]}{more}"
            part.nodes[f"to:{key}"]["leaf"] = Leaf(name, "", "output", "output", name, ())
    return part


def _address(leaf: Leaf) -> str:
    """The path of the module of a leaf, and the name if the leaf is an operation."""
    if leaf.paths or not leaf.place:
        return leaf.target
    return f"{leaf.place[-1]}: {leaf.name}"


def _below(place: tuple[str, ...], focus: str) -> tuple[str, ...]:
    """A place without the focus and its parents."""
    return next((place[at + 1 :] for at, call in enumerate(place) if module_of(call) == focus), ())


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
    last = focus.rpartition(".")[2]
    same_end = sorted((path for path in shown if path.rpartition(".")[2] == last), key=lambda path: path.count("."))
    near = difflib.get_close_matches(focus, sorted(shown), _SHOWN) or same_end[:_SHOWN]
    similar = f"; did you mean {' or '.join(map(repr, near))}?" if near else ". See model.named_modules()."
    return f"the model has no module {focus!r}{similar}"
