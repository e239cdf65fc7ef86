"""Contracting scopes."""

from __future__ import annotations

import networkx as nx
import pytest

from hra_fx.view.tree import Item, Leaf, Scope, contract, merge_repeats, span


def leaf(name: str, detail: str = "", *marks: str, kind: str = "module") -> Leaf:
    return Leaf(name, detail, kind, "call_module", name, (), marks)  # type: ignore[arg-type]


def chain(*items: Item, eager: bool = False, name: str = "m", extra: tuple[tuple[int, int], ...] = ()) -> Scope:
    edges = () if eager else tuple(sorted({*((i, i + 1) for i in range(len(items) - 1)), *extra}))
    return Scope(name, name, "Net", eager, items, edges, (0,), (len(items) - 1,))


def test_contracting_keeps_outer_edges_and_ports() -> None:
    scope = chain(*map(leaf, "abcde"), extra=((0, 3), (1, 4)))
    got = contract(scope, [range(1, 4)], lambda whole, run: leaf("bcd"))
    assert [item.name for item in got.items] == ["a", "bcd", "e"]
    assert got.edges == ((0, 1), (1, 2))
    assert (got.inputs, got.outputs) == ((0,), (2,))


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("length", [2, 3])
def test_a_contracted_run_makes_no_cycle(start: int, length: int) -> None:
    scope = chain(*map(leaf, "abcdefg"), extra=((0, 2), (1, 3), (2, 6), (0, 5)))
    got = contract(scope, [range(start, start + length)], lambda whole, run: leaf("x"))
    assert nx.is_directed_acyclic_graph(nx.DiGraph(got.edges))
    assert all(i < j for i, j in got.edges)


def test_blocks_that_look_alike_are_drawn_once_with_all_their_sites() -> None:
    blocks = [
        chain(leaf("fc", "Linear 4→4", f"h.{i}.fc", kind="adapted_layer"), leaf("act", "ReLU"), name=f"h.{i}")
        for i in range(4)
    ]
    got = merge_repeats(chain(*blocks, leaf("head")))
    assert [span(item) for item in got.items] == ["h.0 … 3", "head"]
    assert got.items[0].count == 4
    assert list(got.items[0].marks) == [f"h.{i}.fc" for i in range(4)]


def test_another_shape_class_or_name_is_not_merged() -> None:
    kinds = [leaf("fc1", "Linear 4→4"), leaf("fc2", "Linear 4→8"), leaf("fc3", "ReLU"), leaf("act3", "ReLU")]
    scope = chain(*kinds)
    assert merge_repeats(scope) == scope


def test_blocks_side_by_side_are_not_a_chain() -> None:
    branches = [chain(leaf("fc", "Linear 4→4"), name=f"b.{i}") for i in range(3)]
    scope = Scope("m", "m", "Net", False, (leaf("x"), *branches, leaf("sum")), tuple((0, i) for i in (1, 2, 3)))
    assert merge_repeats(scope) == scope


@pytest.mark.parametrize(
    ("first", "last", "shown"),
    [
        ("layer.0", "layer.11", "layer.0 … 11"),
        ("block.1.layer", "block.3.layer", "block.1 … 3.layer"),
        ("layer.10", "layer.12", "layer.10 … 12"),
        ("fc", "", "fc"),
        ("f", "f@1", "f … f@1"),
        ("bn", "pool", "bn … pool"),
    ],
)
def test_spans(first: str, last: str, shown: str) -> None:
    assert span(Leaf(first, "", "module", "call_module", first, (), count=2, last=last)) in (
        shown,
        shown.replace("f@1", "@1"),
    )
