"""Contracting scopes, and neighbors that look alike."""

from __future__ import annotations

import networkx as nx
import pytest

from hra_fx.view.tree import Leaf, Scope, contract, merge_repeats


def leaf(name: str, detail: str = "") -> Leaf:
    return Leaf(name, detail, "module", "call_module", name, ())


def chain(names: str, *extra: tuple[int, int]) -> Scope:
    edges = tuple(sorted({*((i, i + 1) for i in range(len(names) - 1)), *extra}))
    return Scope("m", "m", "Net", False, tuple(map(leaf, names)), edges, (0,), (len(names) - 1,))


def test_contracting_keeps_outer_edges_and_ports() -> None:
    got = contract(chain("abcde", (0, 3), (1, 4)), [range(1, 4)], lambda whole, run: leaf("bcd"))
    assert [item.name for item in got.items] == ["a", "bcd", "e"]
    assert got.edges == ((0, 1), (1, 2))
    assert (got.inputs, got.outputs) == ((0,), (2,))


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("length", [2, 3])
def test_a_contracted_run_makes_no_cycle(start: int, length: int) -> None:
    scope = chain("abcdefg", (0, 2), (1, 3), (2, 6), (0, 5))
    got = contract(scope, [range(start, start + length)], lambda whole, run: leaf("x"))
    assert nx.is_directed_acyclic_graph(nx.DiGraph(got.edges))
    assert all(i < j for i, j in got.edges)


def test_neighbors_that_differ_or_are_no_chain_are_not_merged() -> None:
    kinds = (leaf("fc1", "Linear 4→4"), leaf("fc2", "Linear 4→8"), leaf("fc3", "ReLU"), leaf("act3", "ReLU"))
    row = Scope("m", "m", "Net", False, kinds, ((0, 1), (1, 2), (2, 3)))
    branches = (leaf(f"fc{index}", "Linear 4→4") for index in range(3))
    fork = Scope("m", "m", "Net", False, (leaf("x"), *branches, leaf("sum")), tuple((0, i) for i in (1, 2, 3)))
    for scope in (row, fork):
        assert merge_repeats(scope) == scope
