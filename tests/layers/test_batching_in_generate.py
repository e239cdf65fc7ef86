"""`generate` computes the factors of a model once, and its forwards use them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.three_layers import Net, X, adapted, vectors_of, wanted
from oracles import relative_error
from torch import Tensor

import hra_fx


class Generator(Net):
    """Calls itself several times, as language models do."""

    def generate(self, x: Tensor, between: Callable[[Any], object] = lambda model: None) -> list[Tensor]:
        found = []
        for _ in range(3):
            found.append(self(x))
            between(self)
        return found


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_generate_has_the_vectors_of_its_call(guard: Any) -> None:
    model = adapted(Generator)
    with guard():
        for output in model.generate(X):
            assert relative_error(output, wanted(model, X)) < 1e-12
    with torch.no_grad():
        model.one.hra_u["default"].data.mul_(-1).add_(1)
        assert relative_error(model.generate(X)[0], wanted(model, X)) < 1e-12


def test_generate_with_gradients_trains() -> None:
    model = adapted(Generator)
    output = model.generate(X)[1]
    found = torch.autograd.grad(output.square().sum(), vectors_of(model))
    sought = torch.autograd.grad(wanted(model, X).square().sum(), vectors_of(model))
    for one, other in zip(found, sought, strict=True):
        assert relative_error(one, other) < 1e-9


CHANGES: dict[str, Callable[[Any], object]] = {
    "scale": lambda model: hra_fx.set_scale(model, "default", 0.0),
    "vectors": lambda model: model.one.hra_u["default"].add_(1.0),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: -0.5 + tensor for name, tensor in model.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_generate(change: str) -> None:
    sought: list[Tensor] = []

    def between(model: Any) -> None:
        if not sought:
            CHANGES[change](model)
            sought.append(hra_fx.fold(copy.deepcopy(model))(X))

    with torch.no_grad():
        first, second, _ = adapted(Generator, init_weights=False, r=2).generate(X, between)
    assert relative_error(second, sought[0]) < 1e-12
    assert relative_error(second, first) > 1e-3
