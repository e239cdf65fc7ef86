"""Wrong uses of graph mode: what the errors and warnings say."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Callable
from functools import cache
from logging.handlers import BufferingHandler
from typing import Any

import pytest
import torch
from graph_modules import COPIES, X, config
from layers.checking import assert_same
from torch import Tensor, nn
from tracing.captured import twins
from tracing.models import Branches, Two

import hra_fx
from hra_fx.errors import AdapterError, HRAWarning

CALLED = r"The arguments of this graph are `x`\. Capture a call with the others, or call the original model\."
READ = r"It is a graph of one call, without other methods .* the original model has the same layers and adapters"


@cache
def graph_of_two() -> Any:
    return hra_fx.transform(Two().double(), config(), trace=True)


@pytest.mark.parametrize("copied", [lambda graph: graph, *COPIES], ids=["graph", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(
    ("use", "kind", "message"),
    [
        (lambda graph: graph(X, labels=X), TypeError, rf"unexpected keyword argument 'labels'\. {CALLED}"),
        (lambda graph: graph(), TypeError, rf"missing 1 required positional argument: 'x'\. {CALLED}"),
        (lambda graph: graph(X, X), TypeError, rf"takes 2 positional arguments but 3 were given\. {CALLED}"),
        (lambda graph: graph.generate(X), AttributeError, rf"' object has no attribute 'generate'\. {READ}"),
        (lambda graph: graph.config, AttributeError, rf"' object has no attribute 'config'\. {READ}"),
    ],
    ids=["labels", "missing", "too many", "generate", "config"],
)
def test_what_a_graph_is(
    copied: Callable[[Any], Any], use: Callable[[Any], object], kind: type[Exception], message: str
) -> None:
    graph = copied(graph_of_two())
    with pytest.raises(kind, match=message):
        use(graph)
    assert graph(X).shape == (4, 5) and not hasattr(graph, "config")


class Scales(Two):
    def forward(self, x: Tensor, factor: Tensor) -> Any:  # type: ignore[override]
        return self.second(self.first(x)) * factor


def test_other_errors_of_a_call_are_those_of_the_model() -> None:
    graph = hra_fx.transform(Scales().double(), config(), trace=True)
    with pytest.raises(TypeError, match=r"^only integer tensors of a single element can be converted to an index$"):
        graph(X, "text")


def test_the_original_model_has_the_adapters_of_its_graph() -> None:
    model = Two().double()
    plain = model(X)
    graph, eager = twins(model, X)
    assert_same(model(X), eager(X))
    assert not torch.allclose(model(X), plain) and graph.first is model.first


class Embeds(nn.Sequential):
    def __init__(self, branch: type[Two]) -> None:
        super().__init__(nn.Embedding(5, 6), branch())


@pytest.mark.parametrize("branch", [Two, Branches], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize(
    ("make", "example", "reason"),
    [
        (lambda branch: branch().double(), X.float(), "RuntimeError: mat1 and mat2 must have the same dtype"),
        (Embeds, torch.full((4,), 9), "IndexError: index out of range"),
    ],
    ids=["dtype", "vocabulary"],
)
def test_an_example_that_the_model_does_not_take(
    branch: type[Two], make: Callable[[type[Two]], nn.Module], example: Tensor, reason: str
) -> None:
    model = make(branch).eval()
    before = str(model), pickle.dumps(model.state_dict())
    message = rf"{type(model).__name__}: in eval mode, it does not run on the example \({reason}.*\)\. Pass `example_in"
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config(), trace=True, example_inputs=example)
    assert (str(model), pickle.dumps(model.state_dict())) == before


class Swallows(Two):
    def forward(self, x: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
        hidden = self.first(x if x.shape[0] < 100 else x[:100])
        hidden = hidden if mask is None else hidden * mask
        return self.second(hidden) * more.get("factor", 1)


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("masks", "`example_inputs`: Swallows does not read 'masks'. Did you mean 'mask'?"),
        ("labels", "`example_inputs`: Swallows does not read 'labels'."),
        ("factor", None),
        ("mask", None),
    ],
)
def test_an_argument_that_nothing_reads(name: str, warning: str | None, recwarn: pytest.WarningsRecorder) -> None:
    log, written = logging.getLogger("torch._export.non_strict_utils"), BufferingHandler(10)
    log.addHandler(written)  # torch writes about sizes of 1
    inputs = {"x": X, name: torch.ones(4, 1).double()}
    graph, eager = twins(Swallows().double(), inputs)
    assert [str(found.message) for found in recwarn if found.category is HRAWarning] == [warning] * bool(warning)
    assert_same(graph(**inputs), eager(**inputs))
    log.removeHandler(written)
    assert not written.buffer


def test_a_hook_that_may_be_the_reason_is_named() -> None:
    model, calls = Two().double(), itertools.count(1)
    model.first.register_forward_hook(lambda _, __, output: output * next(calls))
    with pytest.raises(AdapterError, match=r"output differs for the example: .* Hooks of first may be the reason\. "):
        hra_fx.transform(model, config(), trace=True, example_inputs=X)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own
def test_a_strict_program_of_a_graph_has_the_names_of_its_modules() -> None:
    graph, _ = twins(Two().double(), X)
    program = torch.export.export(graph, (X,), strict=True)
    modules = {data["module"] for _, data in hra_fx.to_networkx(program).nodes(data=True)}
    assert modules == {"", "first", "first.hra_u", "second", "second.hra_u"}
