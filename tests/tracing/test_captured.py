"""Captures by `torch.export`: inputs and outputs of each form, and what a graph checks of them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from graph_modules import COPIES, X, config
from layers.checking import assert_same, gradients, vectors_of
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from tracing.captured import llama, run, tokens, twins
from tracing.models import Branches, Creates, Optional, Two

import hra_fx
from hra_fx.errors import AdapterError


class Normed(Branches):
    """Casts, as the norms of language models do."""

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + 1e-6)


def test_a_graph_is_compiled_exported_and_runs_under_autocast() -> None:
    graph, eager = twins(Normed().eval(), X.float())
    compiled = torch.compile(graph, backend="eager", dynamic=True)
    for x in (X.float(), torch.cat([X, X]).float()):
        assert_same(compiled(x)["out"], eager(x)["out"], rtol=1e-6)
    assert_same(torch.export.export(graph, (X.float(),)).module()(X.float()), eager(X.float()), rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (model(X.float())["out"] for model in (graph, eager))
    assert found.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(found, wanted)


class Blocks(Branches):
    def middle(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.first(hidden[:, :6]).abs()
            scale = torch.no_grad()(torch.mm)(scale.mT, scale)
        return hidden @ scale


class Router(nn.Linear):
    """Returns two tensors, as the routers of Llama 4 and PhiMoE do."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input).topk(2)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), Router(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores, places = self.second(self.first(x) if x.shape[0] > 0 else x)
        gathered: Tensor = torch.gather(self.first(x), 1, places) * scores
        return gathered


class InPlace(Branches):
    """Writes into the output of a layer, and has variadic arguments."""

    def forward(self, *given: Any) -> Any:  # type: ignore[override]
        x, factor = given
        hidden = self.first(x if x.shape[0] < 100 else x[:100])
        hidden += 1
        hidden[:, 0] = 0
        return self.second(F.relu_(hidden)) * factor


class Rescaled(nn.Linear):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return F.linear(x, self.weight, self.bias) * factor


class CalledTwice(Branches):
    """The graph has the operators of the first call, and the second call itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Rescaled(8, 8)

    def middle(self, hidden: Tensor) -> Any:
        return self.part(torch.relu(self.part(hidden, 2.0)))


class WithoutBackward(Branches):
    """The last output does not have a backward pass."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        out = super().forward(x)["out"]
        return {"out": out, "rest": torch.igamma(out.abs() + 1, out.abs() + 1)}


@pytest.mark.parametrize(
    ("make", "example", "other"),
    [
        (Blocks, {"x": X}, {"x": X.sin()}),
        (Routed, {"x": X}, {"x": torch.randn(9, 6).double()}),
        (InPlace, (X, 3), (X[:3], 3)),
        (CalledTwice, {"x": X}, {"x": X.sin()}),
        (WithoutBackward, {"x": X}, {"x": X.sin()}),
        (Optional, {"x": X, "mask": X[0, 0].expand(8)}, {"x": X.sin(), "mask": X[0, 1].expand(8)}),
    ],
)
def test_other_calls_and_folds_do_what_the_model_does(make: type[nn.Module], example: Any, other: Any) -> None:
    def first_output(model: Any) -> Tensor:
        found = model(**other) if isinstance(other, dict) else model(*other)
        return found["out"] if isinstance(found, dict) else found

    graph, eager = twins(make().double(), example)
    found, wanted = first_output(graph), first_output(eager)
    assert_same(found, wanted)
    ours, theirs = (gradients(out, [*vectors_of(of).values()]) for out, of in ((found, graph), (wanted, eager)))
    for one, expected in zip(ours, theirs, strict=True):
        assert_same(one, expected, rtol=1e-8)
    assert_same(first_output(hra_fx.fold(graph)), wanted)


def test_a_tensor_that_a_forward_creates_is_not_a_buffer() -> None:
    base = Creates().double()
    graph = hra_fx.transform(copy.deepcopy(base), config(r=2), trace=True, example_inputs=X, dynamic_shapes=({},))
    stored = pickle.dumps(graph)
    for model in (graph, copy.deepcopy(graph), pickle.loads(stored), copy.deepcopy(pickle.loads(stored))):
        assert not list(model.named_buffers())
        assert_same(model(X), base(X))
        assert list(hra_fx.fold(model).state_dict()) == list(base.state_dict())


class Frozen(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def middle(self, hidden: Tensor) -> Any:
        return F.dropout(self.norm(hidden), 0.5, self.training)


def test_a_layer_of_a_graph_has_a_mode_of_its_own() -> None:
    graph, eager = twins(Frozen().double(), X)
    for model in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        copied = copy.deepcopy(eager)
        for each in (model, copied):
            each.train().norm.eval()
        assert_same(*(run(each, {"x": X}) for each in (model, copied)))


# ---- arguments ----


def test_an_example_is_made_from_the_configuration_and_sizes_that_do_not_fit_are_named() -> None:
    model = llama().eval()
    plain = copy.deepcopy(model)
    graph = hra_fx.transform(model, config("q_proj", r=2), trace=True)
    inputs = tokens(3, 9)
    torch.testing.assert_close(graph(**inputs).logits, plain(**inputs).logits)
    cached = tokens(2, 5) | {"use_cache": True}  # a graph returns no cache
    made: Any = hra_fx.transform(copy.deepcopy(plain), config("q_proj", r=2), trace=True, example_inputs=cached)
    torch.testing.assert_close(made(**cached).logits, plain(**cached).logits)
    shapes = {name: {0: Dim("batch")} for name in ("input_ids", "attention_mask")}
    fixed = hra_fx.transform(
        plain, config("q_proj", r=2), trace=True, example_inputs=tokens(2, 5), dynamic_shapes=shapes
    )
    assert fixed(**tokens(3, 5)).logits.shape == (3, 5, 16)
    for copied in COPIES:
        message = r"captured for inputs with `input_ids\.size\(\)\[1\] == 5`.*pass them as `example_inputs`"
        with pytest.raises(AssertionError, match=message):
            copied(fixed)(**tokens(2, 6))


class Numbered(Branches):
    """Its last arguments have the names that torch.export gives to items of `*x`."""

    def forward(self, x: list[Any], x_1: Tensor, x_2: Tensor) -> Any:  # type: ignore[override]
        hidden = self.first(x[0]) * (3 if x[1].shape[0] > 5 else 1)
        return self.second(hidden * 2 if x[2][0].shape[0] > 5 else hidden) + x_1.sum() + x_2.sum()


def test_an_argument_with_a_number_is_not_an_item_of_another_one() -> None:
    more, few = torch.cat([X, X]), X[:2]
    inputs = {"x": [X, more, [more]], "x_1": few, "x_2": few}
    graph, eager = twins(Numbered().double(), inputs)
    assert_same(graph(**inputs), eager(**inputs))
    for item, x in ((r"x\[1\]", [X, X, [more]]), (r"x\[2\]\[0\]", [X, more, [X]])):
        with pytest.raises(AssertionError, match=rf"captured for inputs with `.*{item}\.size"):
            graph(x=x, x_1=few, x_2=few)


class Arguments(Branches):
    def forward(self, x: Tensor, mask: Tensor | None = None, shift: Tensor | None = None, **others: Any) -> Any:
        return super().forward(x * mask + shift, scale=others["gain"])


def test_the_inputs_have_the_order_of_the_model() -> None:
    given = {"gain": 2.0, "shift": X.cos(), "mask": X.sin(), "x": X}
    graph, eager = twins(Arguments().double(), given)
    for found in (graph(**given), graph(X, X.sin(), X.cos(), gain=2.0)):
        assert_same(found, eager(**given))


class Rows(NamedTuple):
    x: Tensor
    scale: Tensor


@dataclass
class Found:
    out: Tensor
    rows: Any
    aux: Tensor | None = None


class Named(Branches):
    def forward(self, rows: Rows, sizes: Any) -> Any:  # type: ignore[override]
        out = super().forward(rows.x * sizes["scale"])["out"]
        return Found(out, OrderedDict(rows=Rows(out.sin(), rows.scale)))


@pytest.mark.parametrize("copied", [lambda graph: graph, *COPIES], ids=["graph", "deepcopy", "pickle", "torch.save"])
def test_named_tuples_ordered_dictionaries_and_dataclasses_are_inputs_and_outputs(copied: Any) -> None:
    graph, eager = twins(Named().double(), (Rows(X, X), OrderedDict(scale=X)))
    inputs = Rows(X.sin(), X), OrderedDict(scale=X.cos())
    found, wanted = copied(graph)(*inputs), eager(*inputs)
    assert type(found) is Found and type(found.rows) is OrderedDict and type(found.rows["rows"]) is Rows
    assert_same(found.out, wanted.out)
    assert_same(found.rows["rows"].x, wanted.rows["rows"].x)
    assert Found not in pytree.SUPPORTED_NODES


# ---- hooks ----


def test_hooks_of_the_model_run() -> None:
    model = Two().double()
    model.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    with pytest.raises(AdapterError, match=r"it has forward hooks, which torch\.fx does not run\. Pass example_inputs"):
        hra_fx.transform(model, config(), trace=True)
    graph, eager = twins(model, X)
    assert_same(graph(X), eager(X))
