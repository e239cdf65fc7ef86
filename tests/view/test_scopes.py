"""From models to leaves, scopes and a layout, with the flow of values of the captured graph."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import pytest
import torch
import torchvision
from drawn_models import Pattern, Residual
from hypothesis import given, settings, strategies as st
from tiny_models import llama
from torch import nn

import hra_fx
from hra_fx.view.drawing import drawing_of
from hra_fx.view.expressions import contracted, join_operations
from hra_fx.view.graph import leaves_of
from hra_fx.view.layout import Layout, Route, Size, rows_of
from hra_fx.view.scopes import scope_tree
from hra_fx.view.subject import subject_of
from hra_fx.view.tree import Edge, Item, Scope, span


def adapted(model: nn.Module, targets: str | list[str] = r"(.*\.)?fc\d*", r: int = 2) -> nn.Module:
    return hra_fx.transform(model.eval(), hra_fx.HRAConfig(r=r, target_modules=targets))


def tree(model: nn.Module) -> Scope:
    return scope_tree(leaves_of(subject_of(model, hra_fx.graphs(model))), "model")


def scopes(item: Item) -> Iterator[Scope]:
    if isinstance(item, Scope):
        yield item
        for part in item.items:
            yield from scopes(part)


def test_adapted_layers_are_connected_as_in_the_captured_graph() -> None:
    model = adapted(torchvision.models.resnet18(), r".*(conv\d|downsample\.0|fc)")
    captured = hra_fx.graphs(model)[""]
    flow = nx.DiGraph((source, node) for node in captured.graph.nodes for source in node.all_input_nodes)
    adapted_paths = {row.path for row in hra_fx.report(model)}
    layers = {node: node.target for node in flow if node.target in adapted_paths}
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
    assert block.edges == ((-1, 0, 0), (-1, 3, 0), (0, 1, 0), (1, 2, 0), (2, 3, 0))
    assert block.outputs == (3,)


def test_query_key_and_value_arrive_separately_and_the_inputs_of_attention_are_named() -> None:
    found = drawing_of(llama(num_hidden_layers=2), {"input_ids": torch.arange(5)[None]})
    (attention,) = [scope for scope in scopes(found.tree()) if scope.class_name == "LlamaAttention"]
    names = [item.name for item in attention.items]
    flow = nx.DiGraph((i, j) for i, j, _ in attention.edges)
    sources = flow.pred[names.index("scaled_dot_product_attention")]
    origins = [{names[box] for box in nx.ancestors(flow, source) if box >= 0} for source in sources]
    projections = [origin & {"q_proj", "k_proj", "v_proj"} for origin in origins]
    assert sorted(projections, key=sorted) == [{"k_proj"}, {"q_proj"}, {"v_proj"}]
    assert attention.ports == ("input_layernorm", "rotary_emb")
    assert {names[j] for i, j, _ in attention.edges if i == ~0} == {"q_proj", "k_proj", "v_proj"}
    assert attention.shape == "1×5×32"


def test_layers_that_read_other_values_are_separate_boxes_and_their_pattern_is_folded() -> None:
    (layers,) = [scope for scope in scopes(tree(adapted(Pattern()))) if scope.name == "layers"]
    pattern, rest = layers.items
    assert isinstance(pattern, Scope) and (span(pattern), pattern.count) == ("layers.0 … 5", 2)
    assert [(span(item), item.count) for item in pattern.items] == [("layers.0 … 1", 2), ("layers.2", 1)]
    marks = [[int(mark.split(".")[1]) for mark in item.marks] for item in (*pattern.items, rest)]
    assert marks == [[0, 1, 3, 4], [2, 5], [6, 7]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_operations_are_joined_without_a_cycle_to_at_most_12_boxes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    pairs = [(i, j) for j in range(count) for i in range(max(j - 6, 0), j)]
    flow: nx.DiGraph[int] = nx.DiGraph(data.draw(st.sets(st.sampled_from(pairs)))) if pairs else nx.DiGraph()
    flow.add_nodes_from(range(count))
    small, leaving = (data.draw(st.sets(st.integers(0, count - 1))) for _ in range(2))
    boxes = join_operations(flow, small, leaving)
    assert nx.is_directed_acyclic_graph(contracted(flow, boxes))
    assert {box for group, box in boxes.items() if group not in small} == set(range(count)) - small
    assert all(boxes[group] in small for group in small)
    if len(small) == count:
        assert len(set(boxes.values())) <= 12


# ---- the layout ----

Graph = tuple[list[Size], list[Edge], list[int], list[Size]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 14))
    entries = st.sampled_from([(0.0,), (-6.0, 9.0)])
    sizes = [Size(draw(st.integers(20, 220)), draw(st.integers(20, 160)), draw(entries)) for _ in range(count)]
    ports = [Size(draw(st.integers(0, 90)), 18) for _ in range(draw(st.integers(0, 3)))]
    links = [(i, j, port) for j in range(count) for i in range(-len(ports), j) for port in range(len(sizes[j].enter))]
    edges = sorted(draw(st.sets(st.sampled_from(links)))) if links else []
    outputs = st.lists(st.integers(0, count - 1), unique=True, max_size=3).map(sorted)
    return sizes, edges, draw(outputs), ports


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
def test_boxes_do_not_overlap_and_edges_go_down_without_crossing_boxes(graph: Graph) -> None:
    sizes, edges, outputs, ports = graph
    placed = Layout(*graph, rows_of(len(sizes), edges))
    assert overlapping([*sizes, *ports], placed) == []
    ends = [(source, target) for source, target, _ in edges]
    assert [(r.source, r.target) for r in placed.routes] == ends + [(box, -1) for box in outputs]
    for route in placed.routes:
        for x, y in points(route):
            assert -1e-6 <= x <= placed.width + 1e-6
            for box, (size, (left, top)) in enumerate(zip([*sizes, *ports], placed.corners, strict=True)):
                inside = left + 1e-6 < x < left + size.width - 1e-6 and top + 1e-6 < y < top + size.height - 1e-6
                assert not inside, f"edge {route.source} -> {route.target} crosses box {box}"

        heights = [y for _, top, bottom in route.pieces for y in (top, bottom)]
        assert heights == sorted(heights)
        if route.source >= 0:
            (left, top), size = placed.corners[route.source], sizes[route.source]
            assert route.pieces[0][0] == pytest.approx(left + size.width / 2)
            assert route.pieces[0][1] == pytest.approx(top + size.height)
        if route.target >= 0:
            (left, top), size = placed.corners[route.target], sizes[route.target]
            assert left <= route.pieces[-1][0] <= left + size.width
            assert route.pieces[-1][2] == pytest.approx(top)
