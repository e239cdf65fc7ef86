"""What a graph of `torch.export` drops is refused where the graph is trained: the backward pass, and random numbers."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from adapting import picture
from layers.checking import assert_same, gradients, normal
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from tracing.graph_mode import Straight
from tracing.models import Two

import hra_fx
from hra_fx.errors import AdapterError

X = normal(7, 4, 6)


class Branches(Two):
    """torch.fx refuses it; torch.export captures one call."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(self.middle(hidden) if hidden.shape[0] > 2 else hidden)


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


def graph_of(model: nn.Module) -> nn.Module:
    config = hra_fx.HRAConfig(r=2, target_modules=["first", "second"])
    return hra_fx.transform(model, config, trace=True, example_inputs=X)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Rounds, "it calls the custom autograd function Straight, whose backward a graph drops"),
        (WritesInPlace, "it calls the custom autograd function Softmax, whose backward a graph drops"),
        (HooksTensor, "it registers a backward hook on a tensor, which a graph drops"),
        (HooksModule, "backward hooks are registered for first, which a graph drops"),
        (PreHooksModule, "backward hooks are registered for PreHooksModule, which a graph drops"),
        (DrawsInPython, "it draws random numbers of Python or NumPy, or seeds a generator, which happens once"),
        (DrawsInNumpy, "it draws random numbers of Python or NumPy, or seeds a generator, which happens once"),
        (Seeds, "it draws random numbers of Python or NumPy, or seeds a generator, which happens once"),
    ],
)
def test_a_graph_that_would_train_differently_is_refused(make: type[nn.Module], reason: str) -> None:
    model = make().double()
    before, draws = picture(model), (random.getstate(), np.random.get_state()[2])
    message = rf"torch\.export cannot capture {make.__name__}: {reason}.*\. Leave out trace=True"
    with pytest.raises(AdapterError, match=message):
        graph_of(model)
    assert picture(model) == before
    assert (random.getstate(), np.random.get_state()[2]) == draws


def test_hooks_for_all_modules_are_refused() -> None:
    handle = register_module_full_backward_hook(lambda module, given, grads: None)
    try:
        with pytest.raises(AdapterError, match="backward hooks are registered for Branches"):
            graph_of(Branches().double())
    finally:
        handle.remove()


def test_a_graph_to_look_at_is_made() -> None:
    model = hra_fx.transform(Rounds().double(), hra_fx.HRAConfig(r=2, target_modules=["first", "second"]))
    assert_same(hra_fx.graphs(model, X)[""](X), model(X))


def test_the_backward_of_an_operator_is_in_the_graph() -> None:
    base = CallsOperator().double()
    x = X.clone().requires_grad_()
    wanted, found = base(x), graph_of(copy.deepcopy(base))(x)
    assert_same([found, *gradients(found, [x])], [wanted, *gradients(wanted, [x])])
