"""`torch.compile` compiles each set of adapters once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle
from torch._dynamo.utils import counters

import hra_fx


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    "copies", [{}, pytest.param({"modules_to_save": ["head"], "bias": "hra_only"}, marks=pytest.mark.slow)]
)
def test_torch_compile_does_not_compile_again_for_a_set_that_it_knows(copies: dict[str, Any]) -> None:
    plain, model = adapted(net(), a=config("first", "second", **copies), b=config("first", r=3))
    fast, x = torch.compile(model, backend="eager", fullgraph=True), normal(4, 6)
    sets = (["a"], ["b"], ["a", "b"], [])
    for order in sets:
        hra_fx.set_adapter(model, order)
        fast(x)
    graphs = compiled_graphs()
    assert graphs
    for order in (*sets, *reversed(sets)):
        hra_fx.set_adapter(model, order)
        assert_close(fast(x), model(x))
        if not copies:
            assert_close(fast(x), oracle(plain, model, order, x))
    assert compiled_graphs() == graphs


@pytest.mark.usefixtures("_fresh_dynamo")
def test_torch_compile_sees_disabled_merged_and_scaled_adapters() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("first", r=3))
    fast, x = torch.compile(model, backend="eager", fullgraph=True), normal(4, 6)
    hra_fx.set_adapter(model, ["a", "b"])
    wanted = oracle(plain, model, ["a", "b"], x)
    for _ in range(2):
        assert_close(fast(x), wanted)
        with hra_fx.disable_adapters(model):
            assert torch.equal(fast(x), plain(x))
        hra_fx.merge_adapter(model, ["a"])
        assert_close(fast(x), wanted)
        hra_fx.unmerge_adapter(model)
        hra_fx.set_scale(model, "b", 0)
        assert_close(fast(x), oracle(plain, model, ["a"], x))
        hra_fx.set_scale(model, "b", 1)
