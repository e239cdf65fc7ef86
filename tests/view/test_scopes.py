"""From models to leaves, scopes and a layout: every site once, values as they flow in the captured graph."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import pytest
import torchvision
from drawn_models import Residual
from hypothesis import given, settings, strategies as st
from torch import nn

import hra_fx
from hra_fx.view.graph import leaves_of
from hra_fx.view.layout import Layout, Route, Size
from hra_fx.view.scopes import scope_tree
from hra_fx.view.subject import subject_of
from hra_fx.view.tree import Item, Scope


def adapted(model: nn.Module, targets: str | list[str] = r"(.*\.)?fc\d*", r: int = 2) -> nn.Module:
    return hra_fx.transform(model.eval(), hra_fx.HRAConfig(r=r, target_modules=targets))


def tree(model: nn.Module) -> Scope:
    return scope_tree(leaves_of(subject_of(model, hra_fx.graphs(model))), "model")


def scopes(item: Item) -> Iterator[Scope]:
    if isinstance(item, Scope):
        yield item
        for part in item.items:
            yield from scopes(part)


def test_sites_reach_each_other_as_in_the_captured_graph() -> None:
    model = adapted(torchvision.models.resnet18(), r".*(conv\d|downsample\.0|fc)")
    captured = hra_fx.graphs(model)[""]
    flow = nx.DiGraph((source, node) for node in captured.graph.nodes for source in node.all_input_nodes)
    layers = {node: node.meta["hra"].path for node in flow if "hra" in node.meta and node.meta["hra"].role == "layer"}
    want = {(layers[a], layers[b]) for a in layers for b in nx.descendants(flow, a) & layers.keys()}
    picture = leaves_of(subject_of(model, {"": captured}))
    drawn = {key: data["leaf"].target for key, data in picture.nodes(data=True) if data["leaf"].kind == "adapted_layer"}
    assert {(drawn[a], drawn[b]) for a in drawn for b in nx.descendants(picture, a) & drawn.keys()} == want
    assert len(drawn) == 21


def test_a_residual_block_keeps_its_skip_edge() -> None:
    (block,) = [
        scope for scope in scopes(tree(adapted(nn.Sequential(Residual(), nn.Tanh())))) if scope.class_name == "Residual"
    ]
    assert [item.name for item in block.items] == ["fc1", "act", "fc2", "add"]
    assert block.edges == ((0, 1), (1, 2), (2, 3))
    assert block.inputs == (0, 3)
    assert block.outputs == (3,)


# ---- the layout ----

Graph = tuple[list[Size], list[tuple[int, int]], list[int], list[int]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 14))
    sizes = [Size(draw(st.integers(20, 220)), draw(st.integers(20, 160))) for _ in range(count)]
    pairs = [(i, j) for j in range(count) for i in range(j)]
    edges = sorted(draw(st.sets(st.sampled_from(pairs)))) if pairs else []
    boxes = st.lists(st.integers(0, count - 1), unique=True, max_size=3).map(sorted)
    return sizes, edges, draw(boxes), draw(boxes)


def points(route: Route) -> Iterator[tuple[float, float]]:
    """The edge as it is drawn: straight pieces, and between them cubic curves with vertical ends."""
    steps = [step / 16 for step in range(17)]
    for x, top, bottom in route.pieces:
        yield from ((x, top + (bottom - top) * t) for t in steps)
    for (x0, _, y0), (x1, y1, _) in zip(route.pieces, route.pieces[1:], strict=False):
        middle = (y0 + y1) / 2
        for t in steps:
            weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
            yield (
                sum(w * x for w, x in zip(weights, (x0, x0, x1, x1), strict=True)),
                sum(w * y for w, y in zip(weights, (y0, middle, middle, y1), strict=True)),
            )


def overlapping(sizes: list[Size], placed: Layout) -> list[tuple[int, int]]:
    boxes = [(x, y, x + s.width, y + s.height) for s, (x, y) in zip(sizes, placed.corners, strict=True)]
    return [
        (i, j)
        for j, b in enumerate(boxes)
        for i, a in enumerate(boxes[:j])
        if a[0] < b[2] - 1e-6 and b[0] < a[2] - 1e-6 and a[1] < b[3] - 1e-6 and b[1] < a[3] - 1e-6
    ]


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_boxes_are_apart_and_edges_go_down_to_their_boxes_and_cross_none(graph: Graph) -> None:
    sizes, edges, inputs, outputs = graph
    placed = Layout(*graph)
    assert overlapping(sizes, placed) == []
    assert [(r.source, r.target) for r in placed.routes] == [
        *((None, box) for box in inputs),
        *edges,
        *((box, None) for box in outputs),
    ]
    for route in placed.routes:
        for x, y in points(route):
            assert -1e-6 <= x <= placed.width + 1e-6
            for box, (size, (left, top)) in enumerate(zip(sizes, placed.corners, strict=True)):
                inside = left + 1e-6 < x < left + size.width - 1e-6 and top + 1e-6 < y < top + size.height - 1e-6
                assert not inside, f"edge {route.source} -> {route.target} crosses box {box}"

        heights = [y for _, top, bottom in route.pieces for y in (top, bottom)]
        assert heights == sorted(heights)
        if route.source is not None:
            (left, top), size = placed.corners[route.source], sizes[route.source]
            assert route.pieces[0][0] == pytest.approx(left + size.width / 2)
            assert route.pieces[0][1] == pytest.approx(top + size.height)
        if route.target is not None:
            (left, top), size = placed.corners[route.target], sizes[route.target]
            assert left <= route.pieces[-1][0] <= left + size.width
            assert route.pieces[-1][2] == pytest.approx(top)
