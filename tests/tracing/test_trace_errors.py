"""What `transform(..., trace=True)` refuses: the model stays as it was."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapting import picture
from graph_modules import X, config
from layers.checking import assert_same, gradients
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from tracing.captured import bert, tokens
from tracing.models import Branches, Dropout, Straight, Two

import hra_fx
from hra_fx.errors import AdapterError, SelectionError


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


ERRORS: dict[str, tuple[type[nn.Module], dict[str, Any], type[Exception], str]] = {
    "torch.fx": (Branches, {}, AdapterError, r"torch\.fx cannot trace Branches: it branches on a value"),
    "torch.export": (Breaks, {"example_inputs": X}, AdapterError, "torch.export cannot capture Breaks"),
    "autocast": (
        under(lambda: torch.autocast("cpu", torch.bfloat16)),
        {"example_inputs": X},
        AdapterError,
        r"first is called under torch\.autocast or another grad mode",
    ),
    "no_grad": (
        under(torch.no_grad),
        {"example_inputs": X},
        AdapterError,
        r"first is called under torch\.autocast or another grad mode",
    ),
    "selection": (Dropout, {"config": config("nowhere")}, SelectionError, "nowhere"),
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


def test_a_refusal_of_torch_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    with pytest.raises(AdapterError, match=r"torch\.export cannot capture Breaks"):
        hra_fx.transform(Breaks().double(), config(), trace=True, example_inputs=X)
    assert capfd.readouterr() == ("", "")
    assert logger.disabled is before


def test_a_model_with_adapters_is_refused() -> None:
    model = hra_fx.transform(Dropout(), config("first"))
    with pytest.raises(AdapterError, match=r"trace=True: Dropout already has adapters.*hra_fx\.graphs\(model\)"):
        hra_fx.transform(model, config("second"), "other", trace=True)


# ---- what a graph of torch.export drops: the backward pass, and random numbers of Python ----


class Rounds(Branches):
    def middle(self, hidden: Tensor) -> Any:
        return Straight.apply(hidden)  # type: ignore[no-untyped-call]


class Softmax(torch.autograd.Function):
    """Writes into the result of an operator whose own backward needs it, as SEW-D does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = torch.softmax(x, -1)
        output[..., 0] = 0.0
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return output * (grad - (grad * output).sum(-1, keepdim=True))


class WritesInPlace(Branches):
    def middle(self, hidden: Tensor) -> Any:
        return Softmax.apply(hidden)  # type: ignore[no-untyped-call]


class HooksTensor(Branches):
    def middle(self, hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda grad: grad * 2)
        return hidden


class HooksModule(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_full_backward_hook(lambda module, given, grads: None)


class PreHooksModule(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_pre_hook(lambda module, grads: None)


class DrawsInPython(Branches):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden if random.random() < 0.5 else torch.tanh(hidden)


class DrawsInNumpy(Branches):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden if np.random.rand() < 0.5 else torch.tanh(hidden)


class Seeds(Branches):
    def middle(self, hidden: Tensor) -> Tensor:
        torch.manual_seed(3)
        return hidden


@torch.library.custom_op("hra_fx_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator with its own backward, which torch runs by an autograd function that it makes."""
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda context, grad: grad * 2)


class CallsOperator(Branches):
    def middle(self, hidden: Tensor) -> Any:
        return twice(hidden)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Rounds, "it calls the custom autograd function Straight, whose backward a graph drops"),
        (WritesInPlace, "it calls the custom autograd function Softmax, whose backward a graph drops"),
        (HooksTensor, "it registers a backward hook on a tensor, which a graph drops"),
        (HooksModule, "backward hooks are registered for first, which a graph drops"),
        (PreHooksModule, "backward hooks are registered for PreHooksModule, which a graph drops"),
        (DrawsInPython, "it draws random numbers from Python or NumPy, or seeds a generator, which happens once"),
        (DrawsInNumpy, "it draws random numbers from Python or NumPy, or seeds a generator, which happens once"),
        (Seeds, "it draws random numbers from Python or NumPy, or seeds a generator, which happens once"),
    ],
)
def test_a_graph_that_would_train_differently_is_refused(make: type[nn.Module], reason: str) -> None:
    model = make().double()
    before, draws = picture(model), (random.getstate(), np.random.get_state()[2])
    message = rf"torch\.export cannot capture {make.__name__}: {reason}.*\. Leave out trace=True"
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config(), trace=True, example_inputs=X)
    assert picture(model) == before
    assert (random.getstate(), np.random.get_state()[2]) == draws


def test_hooks_for_all_modules_are_refused() -> None:
    handle = register_module_full_backward_hook(lambda module, given, grads: None)
    try:
        with pytest.raises(AdapterError, match="backward hooks are registered for Branches"):
            hra_fx.transform(Branches().double(), config(), trace=True, example_inputs=X)
    finally:
        handle.remove()


def test_a_graph_to_look_at_is_made() -> None:
    model = hra_fx.transform(Rounds().double(), config())
    assert_same(hra_fx.graphs(model, X)[""](X), model(X))


def test_the_backward_of_an_operator_is_in_the_graph() -> None:
    base = CallsOperator().double()
    x = X.clone().requires_grad_()
    graph = hra_fx.transform(copy.deepcopy(base), config(r=2), trace=True, example_inputs=X)
    wanted, found = base(x), graph(x)
    assert_same([found, *gradients(found, [x])], [wanted, *gradients(wanted, [x])])
