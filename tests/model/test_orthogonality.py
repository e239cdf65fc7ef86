"""The orthogonality loss and its gradient against its formula in float64, also at the kink of the norm."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from adapting import adapted, config, vectors_of
from oracles import dense_vectors, relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx import orthogonality_loss

F64 = torch.float64
EXACT = 1e-14


def penalty(trained: Tensor) -> Tensor:
    """`|U_n^T U_n - I|_F` in float64, one cosine after another; differentiable where it is not zero."""
    columns = [column / (column @ column).sqrt() for column in dense_vectors(trained).unbind(dim=1)]
    pairs = [(a @ b - float(i == j)) ** 2 for i, a in enumerate(columns) for j, b in enumerate(columns)]
    return torch.stack(pairs).sum().sqrt()


def network(*targets: str, **fields: Any) -> tuple[nn.Module, list[nn.Parameter]]:
    """A model with random vectors in some of its layers, and these vectors."""
    layers = OrderedDict(conv=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), linear=nn.Linear(7, 5))
    model = adapted(nn.Sequential(layers).double(), *targets, **fields)
    return model, list(vectors_of(model).values())


def set_vectors(vectors: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        vectors.copy_(values)


@pytest.mark.parametrize("r", [2, 3, 8])
@pytest.mark.parametrize("init_weights", [False, True])
def test_value_and_gradient_are_those_of_the_formula_summed_over_layers(r: int, init_weights: bool) -> None:
    model, vectors = network("conv", "linear", r=r, init_weights=init_weights)
    wanted = sum((penalty(each) for each in vectors), torch.zeros((), dtype=F64))
    loss = orthogonality_loss(model)
    assert (loss.shape, loss.dtype) == ((), F64)
    assert relative_error(loss, wanted) < EXACT
    loss.backward()
    for each, gradient in zip(vectors, torch.autograd.grad(wanted, vectors), strict=True):
        assert relative_error(each.grad, gradient) < 1e-13
        assert float(each.grad.norm()) > 1e-2
        # The lengths do not matter, so the gradient is orthogonal to the vectors.
        assert abs(float((each.grad * each.detach()).sum())) < 1e-13


@pytest.mark.parametrize(
    ("values", "value"),
    [
        (torch.eye(7, 3), 0.0),
        (torch.zeros(7, 3), math.sqrt(3)),  # a zero vector has no unit length, so its entry on the diagonal counts
        (torch.eye(7, 1).repeat(1, 2), math.sqrt(2)),
    ],
    ids=["orthonormal", "zero vectors", "equal vectors"],
)
def test_the_gradient_at_the_kink_and_the_maximum_is_zero(values: Tensor, value: float) -> None:
    model, (vectors,) = network("linear", r=values.shape[1], pairs=False)
    set_vectors(vectors, values)
    loss = orthogonality_loss(model)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=EXACT, abs=0)
    assert torch.equal(vectors.grad, torch.zeros_like(values, dtype=F64))


def test_active_adapters_without_gram_schmidt_count_and_no_others() -> None:
    model, _ = network("linear", r=3)
    for name, fields in (("second", {}), ("gs", {"apply_GS": True}), ("idle", {})):
        hra_fx.add_adapter(model, name, config("linear", r=2, init_weights=False, **fields))
    hra_fx.set_adapter(model, ["default", "second", "gs"])
    box = model.linear.hra_u
    loss = orthogonality_loss(model)
    loss.backward()
    assert relative_error(loss, penalty(box["default"]) + penalty(box["second"])) < EXACT
    assert [name for name in box if box[name].grad is not None] == ["default", "second"]
    hra_fx.set_adapter(model, "gs")
    zero = orthogonality_loss(model)  # it can be added to a loss
    (torch.ones(2, requires_grad=True).sum() + zero).backward()
    assert (zero.shape, float(zero.detach())) == ((), 0.0)


@pytest.mark.parametrize(
    ("dtype", "expected", "bound"), [(torch.bfloat16, torch.float32, 1e-6), (torch.float32, F64, 1e-7)]
)
def test_the_loss_is_computed_in_float32_at_least_and_in_the_widest_dtype(
    dtype: torch.dtype, expected: torch.dtype, bound: float
) -> None:
    model, vectors = network("conv", "linear", r=4)
    model.conv.to(dtype), model.linear.to(torch.bfloat16 if dtype == torch.bfloat16 else F64)
    wanted = penalty(vectors[0]) + penalty(vectors[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        loss = orthogonality_loss(model)
    assert loss.dtype == expected
    assert relative_error(loss, wanted) < bound
