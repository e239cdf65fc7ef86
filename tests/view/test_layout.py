"""The layout, on random graphs: boxes apart, edges down, and no edge through a box."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st

from hra_fx.view.layout import Arrangement, Route, Size, layered

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


def overlapping(sizes: list[Size], placed: Arrangement) -> list[tuple[int, int]]:
    boxes = [(x, y, x + s.width, y + s.height) for s, (x, y) in zip(sizes, placed.corners, strict=True)]
    return [
        (i, j)
        for j, b in enumerate(boxes)
        for i, a in enumerate(boxes[:j])
        if a[0] < b[2] - 1e-6 and b[0] < a[2] - 1e-6 and a[1] < b[3] - 1e-6 and b[1] < a[3] - 1e-6
    ]


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_boxes_are_apart_and_edges_cross_none(graph: Graph) -> None:
    sizes, edges, inputs, outputs = graph
    placed = layered(*graph)
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


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_edges_go_down_and_end_at_their_boxes(graph: Graph) -> None:
    sizes, *_ = graph
    placed = layered(*graph)
    for route in placed.routes:
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


def test_a_port_of_a_box_is_met_by_its_edge() -> None:
    placed = layered([Size(40, 20), Size(200, 60, enter=-70, leave=50), Size(40, 20)], [(0, 1), (1, 2)])
    first, second = placed.routes
    left = placed.corners[1][0]
    assert first.pieces[-1][0] == pytest.approx(left + 100 - 70)
    assert first.pieces[0][0] == pytest.approx(first.pieces[-1][0])
    assert second.pieces[0][0] == pytest.approx(left + 100 + 50)
    assert second.pieces[-1][0] == pytest.approx(second.pieces[0][0])
