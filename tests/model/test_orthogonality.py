"""The orthogonality loss and its gradient against its formula in float64, also at the kink of the norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx import orthogonality_loss

F64 = torch.float64
EXACT = 1e-14
CONV, LINEAR = 0, 3


def penalty(vectors: Tensor) -> Tensor:
    """`|U_n^T U_n - I|_F` in float64, one cosine after another; differentiable where it is not zero."""
    columns = [column / (column @ column).sqrt() for column in vectors.double().unbind(dim=1)]
    pairs = [(a @ b - float(i == j)) ** 2 for i, a in enumerate(columns) for j, b in enumerate(columns)]
    return torch.stack(pairs).sum().sqrt()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, dtype=F64), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5, dtype=F64))


def adapt(base: nn.Module, *targets: int, **fields: Any) -> Any:
    settings = {"r": 4, "init_weights": False, "target_modules": [str(target) for target in targets]}
    return hra_fx.transform(base, hra_fx.HRAConfig(**(settings | fields)))


def one_layer(r: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    return adapt(nn.Sequential(nn.Linear(7, 3, dtype=F64)), 0, r=r, **fields)


def vectors_of(model: Any, layer: int = 0, name: str = "default") -> nn.Parameter:
    vectors: nn.Parameter = model[layer].hra_u[name]
    return vectors


def set_vectors(model: Any, vectors: Tensor, layer: int = 0) -> None:
    with torch.no_grad():
        vectors_of(model, layer).copy_(vectors)


@pytest.mark.parametrize("r", [2, 3, 8])
@pytest.mark.parametrize("init_weights", [False, True])
def test_value_and_gradient_are_those_of_the_formula_summed_over_layers(r: int, init_weights: bool) -> None:
    """Without the fixed anchor that an odd rank has if `init_weights` is set."""
    model = adapt(network(), CONV, LINEAR, r=r, init_weights=init_weights)
    assert (model[CONV].hra_u.anchor("default") is not None) is (init_weights and r % 2 == 1)
    if r == 2 and init_weights:
        set_vectors(model, torch.randn(27, 2), CONV)  # its vectors are equal, and the gradient there is zero
        set_vectors(model, torch.randn(36, 2), LINEAR)
    wanted = penalty(vectors_of(model, CONV)) + penalty(vectors_of(model, LINEAR))
    loss = orthogonality_loss(model)
    assert (loss.shape, loss.dtype) == ((), F64)
    assert relative_error(loss, wanted) < EXACT
    loss.backward()
    for layer in (CONV, LINEAR):
        vectors = vectors_of(model, layer)
        (gradient,) = torch.autograd.grad(wanted, vectors, retain_graph=True)
        assert relative_error(vectors.grad, gradient) < 1e-13
        assert float(vectors.grad.norm()) > 1e-2
        # The lengths do not matter, so the gradient is orthogonal to each vector.
        assert float((vectors.grad * vectors.detach()).sum(dim=0).abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("vectors", "value"),
    [
        (torch.eye(7, 3), 0.0),
        (torch.zeros(7, 3), math.sqrt(3)),  # a zero vector has no unit length, so its entry on the diagonal counts
        (torch.eye(7, 1).repeat(1, 2), math.sqrt(2)),
    ],
    ids=["orthonormal", "zero vectors", "equal vectors"],
)
def test_the_gradient_at_the_kink_and_the_maximum_is_zero(vectors: Tensor, value: float) -> None:
    model = one_layer(vectors.shape[1])
    set_vectors(model, vectors)
    loss = orthogonality_loss(model)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=EXACT, abs=0)
    assert torch.equal(vectors_of(model).grad, torch.zeros_like(vectors, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("length", [1e-30, 1e25])
def test_lengths_do_not_matter_even_at_the_end_of_the_range(length: float, dtype: torch.dtype) -> None:
    model = one_layer(3).to(dtype)
    wanted = penalty(vectors_of(model).detach())
    set_vectors(model, vectors_of(model) * torch.tensor([1.0, length, 1.0], dtype=dtype))
    loss = orthogonality_loss(model)
    loss.backward()
    assert relative_error(loss, wanted) < 10 * torch.finfo(dtype).eps
    assert bool(vectors_of(model).grad.isfinite().all())


def test_active_adapters_without_gram_schmidt_count_and_no_others() -> None:
    model = one_layer(3)
    for name, fields in (("second", {}), ("gs", {"apply_GS": True}), ("idle", {})):
        more = {"r": 2, "init_weights": False, "target_modules": ["0"], **fields}
        hra_fx.add_adapter(model, name, hra_fx.HRAConfig(**more))
    hra_fx.set_adapter(model, ["default", "second", "gs"])
    wanted = penalty(vectors_of(model)) + penalty(vectors_of(model, name="second"))
    loss = orthogonality_loss(model)
    loss.backward()
    assert relative_error(loss, wanted) < EXACT
    box = model[0].hra_u
    assert [name for name in box if box[name].grad is not None] == ["default", "second"]
    hra_fx.set_adapter(model, "gs")
    zero = orthogonality_loss(model)  # it can be added to a loss
    (torch.ones(2, requires_grad=True).sum() + zero).backward()
    assert (zero.shape, float(zero.detach())) == ((), 0.0)


@pytest.mark.parametrize(
    ("dtypes", "expected", "bound"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32, 1e-6),
        ((torch.float32, F64), F64, 1e-7),
    ],
)
def test_the_loss_is_computed_in_float32_at_least_and_in_the_widest_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype, bound: float
) -> None:
    model = adapt(network(), CONV, LINEAR)
    for layer, dtype in zip((CONV, LINEAR), dtypes, strict=True):
        model[layer].to(dtype)
    wanted = penalty(vectors_of(model, CONV)) + penalty(vectors_of(model, LINEAR))
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        loss = orthogonality_loss(model)
    assert loss.dtype == expected
    assert relative_error(loss, wanted) < bound
    assert orthogonality_loss(model.to("meta")).is_meta
