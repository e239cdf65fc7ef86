"""Where a graph could differ from the model without an error: it does the same, or a refusal says why."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapting import picture
from graph_modules import X, config
from layers.checking import assert_same, gradients, vectors_of
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from tracing.captured import bert, tokens, twins
from tracing.models import Branches, Creates, Dropout, Straight, Two

import hra_fx
from hra_fx.errors import AdapterError, SelectionError


class Drops(nn.Module):
    """A part with dropout and a child, which is not one call in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, self.training)


class InParts(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.part = Drops()

    def middle(self, hidden: Tensor) -> Any:
        return self.part(hidden)


def test_parts_of_a_graph_have_modes_of_their_own() -> None:
    graph = hra_fx.transform(InParts().double().train(), config(), trace=True, example_inputs=X)
    assert graph.training and graph.by_mode_0.training
    graph.part.eval()
    for model in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(*(seeded(model, seed) for seed in (1, 2)))  # no dropout is left
        model.part.train()
        assert not torch.equal(*(seeded(model, seed) for seed in (1, 2)))


def seeded(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    found: Tensor = model(X)["out"]
    return found


class One(Branches):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        hidden = self.first(x if x.shape[0] < 100 else x[:100])
        return self.second(hidden * 100 if hidden.shape[0] == 1 else hidden)


class Masked(Branches):
    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        mask = mask[:, :, None] if mask.dim() == 2 else mask
        x = x if x.shape[0] < 100 else x[:100]
        return self.second(self.first(x)) + (mask.sum() if mask.dtype is torch.bool else mask.mean())


@pytest.mark.parametrize(
    ("make", "example", "call", "condition"),
    [
        (One, (X,), (X[:1],), r"x\.size\(\)\[0\] > 1"),
        (Masked, (X, X), (X, X[None]), r"mask\.dim\(\) == 2"),
        (Masked, (X, X), (X, X > 0), r"mask\.dtype\.is_floating_point == True"),
    ],
)
def test_inputs_that_take_another_branch_are_refused(
    make: type[nn.Module], example: Any, call: Any, condition: str
) -> None:
    graph, _ = twins(make().double(), example)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with pytest.raises(AssertionError, match=condition):
        graph(*call)


def test_a_tensor_that_a_forward_creates_is_not_a_buffer() -> None:
    base = Creates().double()
    graph = hra_fx.transform(copy.deepcopy(base), config(r=2), trace=True, example_inputs=X, dynamic_shapes=({},))
    stored = pickle.dumps(graph)
    for model in (graph, copy.deepcopy(graph), pickle.loads(stored), copy.deepcopy(pickle.loads(stored))):
        assert not list(model.named_buffers())
        torch.testing.assert_close(model(X), base(X), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.float()(X.float()), copy.deepcopy(base).float()(X.float()))
        assert list(hra_fx.fold(model).state_dict()) == list(base.state_dict())


class Counts(Branches):
    calls = 0

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.calls += 1
        return self.second(self.first(x if x.shape[0] < 100 else x[:100]))


class InPlace(Branches):
    def forward(self, *given: Any) -> Any:  # type: ignore[override]
        x, factor = given
        hidden = self.first(x if x.shape[0] < 100 else x[:100])
        hidden += 1
        hidden[:, 0] = 0
        return self.second(F.relu_(hidden)) * factor


def test_writes_into_the_output_of_a_layer_and_variadic_arguments() -> None:
    graph, eager = twins(InPlace().double(), (X, 3))
    torch.testing.assert_close(graph(X[:3], 3), eager(X[:3], 3), rtol=1e-12, atol=1e-12)


# ---- errors of a trace ----


class Breaks(Two):
    """Neither torch.fx nor torch.export can trace it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if float(hidden.sum().detach()) > 0 else hidden)


def under(context: Callable[[], Any]) -> type[Two]:
    """A model that torch.fx cannot trace, with all layers under a context."""

    def forward(self: Branches, x: Tensor) -> dict[str, Tensor]:
        with context():
            return Branches.forward(self, x)

    return type("Under", (Branches,), {"forward": forward})


CONTEXT = r"it runs a block under torch\.(autocast|no_grad)"
ERRORS: dict[str, tuple[type[nn.Module], dict[str, Any], type[Exception], str]] = {
    "torch.fx": (Branches, {}, AdapterError, r"torch\.fx cannot trace Branches: it branches on a value"),
    "torch.export": (Breaks, {"example_inputs": X}, AdapterError, "torch.export cannot capture Breaks"),
    "autocast": (under(lambda: torch.autocast("cpu", torch.bfloat16)), {"example_inputs": X}, AdapterError, CONTEXT),
    "no_grad": (under(torch.no_grad), {"example_inputs": X}, AdapterError, CONTEXT),
    "counter": (Counts, {"example_inputs": X}, AdapterError, "after two calls, calls is 2, in its graph None"),
    "arguments": (Branches, {"example_inputs": (X, X, X)}, AdapterError, "the example does not fit its forward"),
    "modules_to_save": (Dropout, {"config": config(modules_to_save=["nowhere"])}, SelectionError, "nowhere"),
    "example_inputs": (Branches, {"example_inputs": 3}, AdapterError, "example_inputs must be a tensor, .*, got int"),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # a new name in transformers 6
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.to("meta"), "bert.embeddings.word_embeddings.weight is on the meta device"),
        (lambda model: model.train().gradient_checkpointing_enable(), "checkpoints its activations, which a graph"),
    ],
)
def test_a_state_that_a_graph_would_drop_is_refused(change: Callable[[Any], object], message: str) -> None:
    model = bert()
    change(model)
    before = picture(model)
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config("query"), trace=True, example_inputs=tokens(2, 5))
    assert picture(model) == before


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaves_the_model_as_it_was(name: str) -> None:
    make, options, kind, message = ERRORS[name]
    model = make().double().eval()
    before = picture(model)
    with pytest.raises(kind, match=message):
        hra_fx.transform(model, **({"config": config(), "trace": True} | options))
    assert picture(model) == before
    assert model(X) is not None


def test_a_model_with_adapters_is_refused() -> None:
    model = hra_fx.transform(Dropout(), config("first"))
    with pytest.raises(AdapterError, match=r"trace=True: Dropout already has adapters.*hra_fx\.graphs\(model\)"):
        hra_fx.transform(model, config("second"), "other", trace=True)


# ---- what a graph of torch.export drops: the backward pass, and random numbers of Python ----


class HooksModule(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(lambda module, given, grads: None)


def middle(change: Callable[[Tensor], Any]) -> type[nn.Module]:
    """A model that does something between its two layers."""
    return type("Changed", (Branches,), {"middle": lambda self, hidden: change(hidden)})


DRAWS = "it draws random numbers from Python or NumPy, or seeds a generator, once in a trace"
TRAINS_DIFFERENTLY = {
    "autograd function": (
        middle(Straight.apply),
        "it calls the custom autograd function Straight, whose backward a graph drops",
    ),
    "tensor hook": (
        middle(lambda hidden: (hidden.register_hook(lambda grad: grad * 2), hidden)[1]),
        r"in eval mode, the gradient of first\.weight differs for the example",
    ),
    "module hook": (HooksModule, "backward hooks are registered for it, which a graph drops"),
    "random": (middle(lambda hidden: hidden if random.random() < 0.5 else torch.tanh(hidden)), DRAWS),
    "numpy": (middle(lambda hidden: hidden if np.random.rand() < 0.5 else torch.tanh(hidden)), DRAWS),
    "seed": (middle(lambda hidden: (torch.manual_seed(3), hidden)[1]), DRAWS),
}


@pytest.mark.parametrize("name", TRAINS_DIFFERENTLY)
def test_a_graph_that_would_train_differently_is_refused(name: str) -> None:
    make, reason = TRAINS_DIFFERENTLY[name]
    model = make().double()
    before, draws = picture(model), (random.getstate(), np.random.get_state()[2])
    message = rf"torch\.export cannot capture {make.__name__}: {reason}.*\. Leave out trace=True"
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config(), trace=True, example_inputs=X)
    assert picture(model) == before
    assert (random.getstate(), np.random.get_state()[2]) == draws


class Stops(torch.autograd.Function):
    """Has no node in the backward graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = x * 2
        ctx.mark_non_differentiable(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Doubles(torch.autograd.Function):
    """Its gradient is that of its operators, and it needs none for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        assert not ctx.needs_input_grad[1]
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Straight.apply, "it calls the custom autograd function Straight"),
        # Behind a ReLU of negative values, the gradients are equal for this example alone.
        (lambda x: torch.relu(Straight.apply(x) - 100), "it calls the custom autograd function Straight"),
        (lambda x: x + Stops.apply(x), r"the gradient of first\.weight differs"),
    ],
)
def test_an_autograd_function_of_a_frozen_model_is_found(function: Callable[[Tensor], Tensor], reason: str) -> None:
    model = middle(function)().double().requires_grad_(False)
    with pytest.raises(AdapterError, match=reason):
        hra_fx.transform(model, config(), trace=True, example_inputs=X)
    assert not any(parameter.requires_grad for parameter in model.parameters())


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
    """One of the outputs does not have a backward pass."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        out = super().forward(x)["out"]
        return {"out": out, "aside": torch.igamma(out.abs() + 1, out.abs() + 1)}


@pytest.mark.parametrize("make", [CalledTwice, WithoutBackward])
def test_gradients_that_cannot_be_compared_are_not(make: type[nn.Module]) -> None:
    model = make().double()
    graph = hra_fx.transform(copy.deepcopy(model), config(), trace=True, example_inputs=X)
    eager = hra_fx.transform(model, config())
    eager.load_state_dict(graph.state_dict(), strict=False)
    wanted, found = (gradients(each(X)["out"], list(vectors_of(each).values())) for each in (eager, graph))
    assert_same(found, wanted)


def test_an_autograd_function_with_the_gradient_of_its_operators_is_captured() -> None:
    two = torch.full((), 2.0, dtype=torch.float64)
    model = middle(lambda hidden: Doubles.apply(hidden, two))().double()
    graph = hra_fx.transform(copy.deepcopy(model), config(), trace=True, example_inputs=X)
    assert_same(graph(X), model(X))


def test_dynamic_shapes_without_a_capture_are_refused() -> None:
    for model in (nn.Sequential(nn.Linear(6, 6)), torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6)))):
        with pytest.raises(AdapterError, match="`dynamic_shapes` needs trace=True"):
            hra_fx.transform(model, config("0"), example_inputs=X, dynamic_shapes=({0: Dim("batch")},))
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
