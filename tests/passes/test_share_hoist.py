"""The passes share and hoist on graphs: what is joined, node counts, values and gradients, idempotence."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from one_layer import BF16, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, fx

from hra_fx.kernels.compile_ops import REFLECTED_BY, REFLECTED_ROWS, UNIT_FACTORS, reflected_by, unit_factors
from hra_fx.layers.target import LayerOperators
from passes.hoist import HoistPass
from passes.share import SharePass
from passes.side_effects import has_side_effects

OPERATORS = LayerOperators(REFLECTED_ROWS, UNIT_FACTORS, REFLECTED_BY)
NAMES = {REFLECTED_ROWS: "rows", UNIT_FACTORS: "factors", REFLECTED_BY: "by"}


def module(graph: fx.Graph, **examples: Tensor) -> fx.GraphModule:
    """A graph with example values, as TorchDynamo sets them."""
    for node in graph.find_nodes(op="placeholder"):
        if node.name in examples:
            node.meta["example_value"] = examples[node.name]
    graph.lint()
    return fx.GraphModule({}, graph)


def counts(graph: fx.Graph) -> dict[str, int]:
    return dict(Counter(NAMES[node.target] for node in graph.nodes if node.target in NAMES))


def two_values(shapes: dict[str, tuple[int, int]]) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """Three layers with the input `x`, and two with an input computed from them."""
    tensors = {name: normal(seed, *shape).requires_grad_() for seed, (name, shape) in enumerate(shapes.items())}
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in ("x", *shapes)}
    q, k, v = (graph.call_function(REFLECTED_ROWS, (nodes["x"], nodes[name])) for name in ("q", "k", "v"))
    middle = graph.call_function(torch.tanh, (graph.call_function(operator.add, (q, k)),))
    gate, up = (graph.call_function(REFLECTED_ROWS, (middle, nodes[name])) for name in ("gate", "up"))
    graph.output((graph.call_function(operator.mul, (gate, up)), v))
    return module(graph, **tensors), tensors


def oracle(x: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    middle = torch.tanh(x @ dense_q(t["q"]).mT + x @ dense_q(t["k"]).mT)
    return (middle @ dense_q(t["gate"]).mT) * (middle @ dense_q(t["up"]).mT), x @ dense_q(t["v"]).mT


EQUAL = dict.fromkeys(("q", "k", "v", "gate", "up"), (12, 3))
ODD = {"q": (12, 3), "k": (12, 5), "v": (12, 3), "gate": (12, 1), "up": (12, 5)}


@pytest.mark.parametrize(
    ("passes", "shapes", "left"),
    [
        ("share", EQUAL, {"factors": 2, "by": 2}),
        ("share", ODD, {"factors": 2, "by": 2}),
        ("hoist", EQUAL, {"factors": 1, "by": 5}),
        ("hoist", ODD, {"factors": 2, "by": 4, "rows": 1}),
        ("share hoist", EQUAL, {"factors": 1, "by": 2}),
        ("share hoist", ODD, {"factors": 3, "by": 2}),
        ("hoist share", EQUAL, {"factors": 1, "by": 5}),
    ],
)
def test_what_is_joined_computes_the_same(
    passes: str, shapes: dict[str, tuple[int, int]], left: dict[str, int]
) -> None:
    graph, tensors = two_values(shapes)
    for name in passes.split():
        step: Any = {"share": SharePass, "hoist": HoistPass}[name](OPERATORS)
        step(graph)
        again = step(graph)
        assert not again.modified, "a second run changes nothing"
    assert counts(graph.graph) == left
    x = normal(9, 2, 7, 12).requires_grad_()
    found, wanted = graph(x, *tensors.values()), oracle(x, tensors)
    asked = (x, *tensors.values())
    gradients = torch.autograd.grad(found[0].square().sum() + found[1].sin().sum(), asked)
    sought = torch.autograd.grad(wanted[0].square().sum() + wanted[1].sin().sum(), asked)
    for one, other in zip((*found, *gradients), (*wanted, *sought), strict=True):
        assert relative_error(one, other) < 1e-11


def test_hoisted_factors_are_at_the_top() -> None:
    graph, _ = two_values(EQUAL)
    HoistPass(OPERATORS)(graph)
    nodes = [node for node in graph.graph.nodes if node.op != "placeholder"]
    assert nodes[0].target is UNIT_FACTORS
    assert [str(node) for node in nodes[0].args[0]] == ["q", "k", "v", "gate", "up"]


def site_pair(between: Any) -> fx.GraphModule:
    """Two layers with one input, and something between them."""
    graph = fx.Graph()
    x, u, v = (graph.placeholder(name) for name in ("x", "u", "v"))
    first = graph.call_function(REFLECTED_ROWS, (x, u))
    between(graph, x, u)
    second = graph.call_function(REFLECTED_ROWS, (x, v))
    graph.output((first, second))
    return module(graph, u=normal(1, 6, 2), v=normal(2, 6, 2))


def written(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_method("mul_", (x, 2))


def written_by_operator(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_function(operator.iadd, (x, 1))


def written_by_aten(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_function(torch.ops.aten.mul_.Tensor, (x, 2))


def written_out(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_function(torch.mul, (x, 2), {"out": x})


def autocast(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", BF16, True, False))


def without_gradients(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_function(torch._C._set_grad_enabled, (False,))


@pytest.mark.parametrize(
    "between", [written, written_by_operator, written_by_aten, written_out, autocast, without_gradients]
)
def test_layers_are_not_joined_across_a_side_effect(between: Any) -> None:
    graph = site_pair(between)
    assert not SharePass(OPERATORS)(graph).modified
    assert counts(graph.graph) == {"rows": 2}


def read(graph: fx.Graph, x: fx.Node, u: fx.Node) -> None:
    graph.call_function(getattr, (x, "shape"))
    graph.call_function(operator.and_, (True, True))
    graph.call_method("view", (x, -1))


def test_reads_are_not_side_effects() -> None:
    assert SharePass(OPERATORS)(site_pair(read)).modified


def test_vectors_that_are_written_into_are_not_hoisted() -> None:
    graph = site_pair(lambda graph, x, u: graph.call_method("mul_", (u, 2)))
    assert not HoistPass(OPERATORS)(graph).modified


def test_vectors_that_are_computed_later_are_moved() -> None:
    graph = fx.Graph()
    x, u, anchor, v = (graph.placeholder(name) for name in ("x", "u", "anchor", "v"))
    first = graph.call_function(REFLECTED_ROWS, (x, u))
    turned = graph.call_method("neg", (graph.call_function(torch.cat, ([anchor, v], 1)),))
    second = graph.call_function(REFLECTED_ROWS, (x, turned))
    graph.output((first, second))
    made = module(graph)
    SharePass(OPERATORS)(made)
    assert counts(made.graph) == {"factors": 1, "by": 1}
    tensors = [normal(seed, *shape) for seed, shape in enumerate([(4, 6), (6, 2), (6, 1), (6, 3)])]
    one, two = made(*tensors)
    assert relative_error(one, tensors[0] @ dense_q(tensors[1]).mT) < 1e-12
    assert relative_error(two, tensors[0] @ dense_q(torch.cat(tensors[2:], 1)).mT) < 1e-12


def test_metadata_moves_to_the_new_nodes() -> None:
    graph, _ = two_values(EQUAL)
    for node in graph.graph.nodes:
        node.meta["nn_module_stack"] = {node.name: (node.name, "Linear")}
    before = [
        node.meta["nn_module_stack"] for node in graph.graph.find_nodes(op="call_function", target=REFLECTED_ROWS)
    ]
    SharePass(OPERATORS)(graph)
    after = [
        user.meta["nn_module_stack"]
        for node in graph.graph.find_nodes(op="call_function", target=REFLECTED_BY)
        for user in node.users
    ]
    assert after == before


def test_in_place_names() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    names = [graph.call_method(name, (x,)) for name in ("add_", "__len__", "relu")]
    assert [has_side_effects(node) for node in names] == [True, False, False]


# The operators


@pytest.mark.parametrize(("dtype", "bound"), [(F32, 1e-5), (BF16, 1e-2)])
def test_operators_in_narrow_dtypes(dtype: torch.dtype, bound: float) -> None:
    x, vectors = normal(1, 2, 5, 48, dtype=dtype), [normal(seed, 48, 4, dtype=F32) for seed in (2, 3)]
    made = unit_factors(vectors)
    for turned, one in zip(reflected_by(x, made[:2], made[2:]), vectors, strict=True):
        assert turned.dtype == dtype
        assert relative_error(turned, x.double() @ dense_q(one).mT) < bound


def test_factors_in_a_batch_are_independent() -> None:
    vectors = [normal(seed, 9, 4) for seed in range(3)]
    vectors[1][:, 2] = 0
    vectors[2] *= 1e-30
    made = unit_factors(vectors)
    for index, one in enumerate(vectors):
        q = torch.eye(9, dtype=F64) - made[index] @ made[3 + index] @ made[index].mT
        assert relative_error(q, dense_q(one)) < 1e-12
