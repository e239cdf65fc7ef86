"""The passes lower and freeze on graphs: which nodes are added and removed, the values, and the refusals."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import META, NodeTag
from passes.freeze import FreezePass
from passes.lower import LowerPass

ATEN = torch.ops.aten


class Factors(nn.Module):
    """A layer with a reflected input, and one with a rotated weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u = nn.Parameter(torch.randn(6, 2))
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        unit = self.u / self.u.norm()
        factor = (unit.mT @ unit).tril().exp()
        seen = x - (x @ unit) @ (unit @ factor).mT
        turned = self.w - (self.w @ unit) @ factor @ unit.mT
        return seen @ self.w.mT + x @ turned.mT + self.w.sum()


def captured() -> fx.GraphModule:
    return torch.export.export(Factors(), (torch.ones(3, 6),)).module()


def frozen(module: fx.GraphModule) -> list[tuple[tuple[int, ...], list[str]]]:
    """Freeze in place; (shape, names of the vectors) of each constant."""
    reads = {node: getattr(module, str(node.target)) for node in module.graph.find_nodes(op="get_attr")}
    made: list[tuple[tuple[int, ...], list[str]]] = []

    def place(value: Tensor, made_of: list[fx.Node]) -> fx.Node:
        module.register_buffer(f"c_{len(made)}", value)
        made.append((tuple(value.shape), [str(node.target) for node in made_of]))
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            return module.graph.get_attr(f"c_{len(made) - 1}")

    FreezePass(reads, [node for node in reads if node.target == "u"], place)(module)
    return made


def test_values_of_vectors_become_constants_and_a_rotated_weight_does_not() -> None:
    module, x = captured(), torch.randn(3, 6)
    expected = module(x)
    assert frozen(module) == [((6, 2), ["u"]), ((2, 6), ["u"]), ((5, 2), ["u"]), ((2, 6), ["u"])]
    counts = Counter(node.target for node in module.graph.nodes if node.op == "call_function")
    assert counts[ATEN.matmul.default] == 5
    assert not {ATEN.tril.default, ATEN.exp.default} & set(counts)
    # Values of weights only are not touched.
    assert counts[ATEN.sum.default] == 1
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-5)


def test_constants_own_their_memory() -> None:
    module, x = captured(), torch.ones(3, 6)
    frozen(module)
    expected = module(x)
    with torch.no_grad():
        module.u.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(module(x), expected)
    assert all(tensor.is_contiguous() for tensor in module.buffers())


def test_a_random_value_of_vectors_cannot_be_frozen() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Parameter(torch.ones(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.nn.functional.dropout(self.u, 0.5, training=True)

    module = torch.export.export(Noisy(), (torch.ones(3, 6),)).module()
    with pytest.raises(GraphInvariantError, match=r"node 'dropout': its value depends on 'u' and is not constant"):
        frozen(module)


def with_operator() -> fx.GraphModule:
    graph = fx.Graph()
    value = graph.placeholder("x")
    value.meta["val"] = torch.empty(3, 2, device="meta")
    node = graph.call_function(operator.matmul, (value, value))
    node.meta = {META: NodeTag("layer", "linear", "reflection"), "stack_trace": "here"}
    graph.output(node)
    return fx.GraphModule(nn.Module(), graph)


def test_lower_replaces_an_operator_by_the_graph_of_its_decomposition() -> None:
    module = with_operator()
    result = LowerPass({operator.matmul: lambda a, b: (a * 2) @ b.mT})(module)
    assert result is not None
    assert result.modified
    inner = [node for node in module.graph.nodes if node.op == "call_function"]
    assert [node.target for node in inner] == [ATEN.mul.Tensor, ATEN.transpose.int, ATEN.mm.default]
    assert all(node.meta["stack_trace"] == "here" for node in inner)
    assert [node.meta.get(META) for node in inner] == [None, None, NodeTag("layer", "linear", "reflection")]
    assert inner[-1].meta["val"].shape == (3, 3)
    x = torch.randn(3, 2)
    assert torch.equal(module(x), (x * 2) @ x.mT)


def test_lower_leaves_a_graph_without_such_operators_alone() -> None:
    module = with_operator()
    before = str(module.graph)
    result = LowerPass({operator.add: torch.add})(module)
    assert result is not None
    assert not result.modified
    assert str(module.graph) == before


def test_lower_refuses_an_argument_of_unknown_shape() -> None:
    module = with_operator()
    next(iter(module.graph.nodes)).meta.clear()
    with pytest.raises(GraphInvariantError, match=r"node 'matmul': the shape of its argument 'x' is unknown"):
        LowerPass({operator.matmul: torch.matmul})(module)
