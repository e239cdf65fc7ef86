"""Switching makes no program anew: not the compiled graph of a region, and not one of torch.compile's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, llama, net, normal, oracle, resnet, sequential
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hra_fx
from hra_fx.model.state import regions_of

WHOLE: dict[str, tuple[Callable[[], nn.Module], list[str], list[str], tuple[int, ...]]] = {
    "sequential": (sequential, ["0", "3"], ["3"], (4, 6)),
    "resnet": (resnet, ["layer1.0.conv1", "fc"], ["fc"], (2, 3, 32, 32)),
    "net": (net, ["first", "second"], ["first"], (4, 6)),
}


def program(model: nn.Module, *args: Tensor) -> Any:
    """The compiled function of a region for these arguments; `None` where its Python forward runs."""
    (region,) = (part._hra_region for path, part in regions_of(model).items() if not path)
    found = region.program(model, args, {})
    return found and found[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_switching_keeps_the_program_of_a_region(name: str, training: bool) -> None:
    build, left, right, shape = WHOLE[name]
    _, model = adapted(build(), a=config(*left), b=config(*right, r=3))
    model.train(training)
    x = normal(*shape)
    first = program(model, x)
    assert first is not None
    for order in (["b"], ["a", "b"], [], ["b", "a"], ["a"]):
        hra_fx.set_adapter(model, order)
        model(x)
        assert program(model, x) is first
    with hra_fx.disable_adapters(model):
        assert program(model, x) is first
    hra_fx.merge_adapter(model)
    assert program(model, x) is first
    hra_fx.unmerge_adapter(model)
    hra_fx.set_scale(model, "a", 0.5)
    assert program(model, x) is first


def test_switching_keeps_the_program_where_copies_come_and_go() -> None:
    saved = {"modules_to_save": ["head", "norm"], "bias": "all"}
    plain, model = adapted(net(), a=config("first", **saved), b=config("second", **saved), c=config("first"))
    x = normal(4, 6)
    first = program(model, x)
    assert first is not None
    for order in ("b", "c", "a"):
        hra_fx.set_adapter(model, order)
        assert program(model, x) is first
    with hra_fx.disable_adapters(model):
        assert program(model, x) is first
        assert torch.equal(model(x), plain(x))


def test_an_adapter_on_the_same_layers_keeps_the_program() -> None:
    _, model = adapted(net(), a=config("first", "second"))
    x = normal(4, 6)
    first = program(model, x)
    hra_fx.add_adapter(model, "b", config("second", r=3))
    assert program(model, x) is first


def test_switching_keeps_the_regions_of_a_model_that_is_captured_in_parts() -> None:
    _, model = adapted(llama(), a=config("gate_proj", "q_proj"), b=config("down_proj", r=3))
    before = {path: id(part._hra_region) for path, part in regions_of(model).items()}
    assert before
    hra_fx.set_adapter(model, ["b", "a"])
    assert {path: id(part._hra_region) for path, part in regions_of(model).items()} == before


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("copies", [{}, {"modules_to_save": ["head"]}, {"bias": "hra_only"}])
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
