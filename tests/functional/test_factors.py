"""Factors of chains, and adapted layers with frozen weights: outputs, gradients and higher derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.checking import pair, run_dense
from one_layer import BF16, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad

from hra_fx.functional.factors import batched_factors
from hra_fx.layers.linear import reflect_rows

quick = settings(max_examples=40, deadline=None, derandomize=True)


def leaf(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return normal(seed, *shape, dtype=dtype).requires_grad_()


def q_of(vectors: Tensor) -> Tensor:
    """`Q` of each chain of a batch, from its factors: `x Q^T = x + (x F^T) R`."""
    chains = [vectors] if vectors.dim() == 2 else list(vectors.unbind())
    factors = batched_factors(chains, [0], vectors.dtype)
    turned = torch.stack(
        [
            torch.eye(len(one), dtype=one.dtype) + rows.mT @ down
            for one, (rows, down) in zip(chains, factors, strict=True)
        ]
    )
    return turned.view(*vectors.shape[:-1], vectors.shape[-2])


@quick
@given(
    n=st.integers(1, 4),
    d=st.integers(1, 24),
    k=st.integers(1, 26),
    scale=st.integers(-140, 140),
    seed=st.integers(0, 99),
)
def test_a_batch_and_its_gradient_at_any_size_and_length(n: int, d: int, k: int, scale: int, seed: int) -> None:
    vectors = (normal(seed, n, d, k) * 10.0**scale).requires_grad_()
    upstream = normal(seed + 1, n, d, d)
    found = q_of(vectors)
    sought = torch.stack([dense_q(one) for one in vectors])
    assert relative_error(found, sought) < 1e-11
    got, wanted = (torch.autograd.grad(one, vectors, upstream)[0] * 10.0**scale for one in (found, sought))
    # In one dimension Q does not depend on the vectors.
    assert relative_error(got, wanted, floor=1e-1) < 1e-9


@pytest.mark.parametrize("lengths", [(1.0, 1e-25), (1e25, 1.0), (1e-25, 1e-25), (0.0, 1.0), (1e-9, 1e9)])
def test_lengths_beyond_the_range_of_float32(lengths: tuple[float, float]) -> None:
    vectors = (normal(2, 16, 2, dtype=F32) * torch.tensor(lengths)).requires_grad_()
    turned = q_of(vectors)
    turned.backward(normal(3, 16, 16, dtype=F32))
    assert relative_error(turned, dense_q(vectors)) < 1e-6
    assert vectors.grad is not None
    assert bool(torch.isfinite(vectors.grad).all())


def test_second_derivatives_and_transforms() -> None:
    vectors = leaf(1, 2, 5, 3)
    assert torch.autograd.gradcheck(q_of, (vectors,))
    assert torch.autograd.gradgradcheck(q_of, (vectors,))
    upstream = normal(4, 3, 2, 5, 5)
    (batched,) = torch.autograd.grad(q_of(vectors), vectors, upstream, is_grads_batched=True)
    each = [torch.autograd.grad(q_of(vectors), vectors, one)[0] for one in upstream]
    assert relative_error(batched, torch.stack(each)) < 1e-12
    one, tangent = normal(2, 5, 3), normal(3, 5, 3)
    columns = torch.func.jacfwd(q_of)(one)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(q_of(forward_ad.make_dual(one, tangent))).tangent
    assert relative_error(pushed, (columns * tangent).sum((-1, -2))) < 1e-12
    step = 1e-6
    moved = (dense_q(one + step * tangent) - dense_q(one - step * tangent)) / (2 * step)
    assert relative_error(pushed, moved) < 1e-8


def test_under_autocast_products_are_narrow_and_rows_are_not() -> None:
    x, vectors = leaf(1, 6, 64, dtype=F32), leaf(2, 64, 4, dtype=F32)

    def reflected(u: Tensor) -> Tensor:
        [(rows, down)] = batched_factors([u], [0], F32)
        assert rows.dtype is F32
        return reflect_rows(x, (rows.to(BF16), down.to(BF16)))

    with torch.autocast("cpu", dtype=BF16):
        y = reflected(vectors)
        # What is added to the rows is small where the reflections do little: the rows themselves keep their digits.
        assert relative_error(reflected(vectors.detach()[:, :1].repeat(1, 2)), x) < 1e-6
    assert y.dtype == F32
    assert relative_error(y, x.double() @ dense_q(vectors).mT) < 5e-3


# ---- layers ----

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(48, 24), (2, 3, 48)),
    "Linear, many rows": (lambda: nn.Linear(48, 24), (2, 300, 48)),
    "Conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1, stride=(2, 1)), (2, 16, 7, 7)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def frozen(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Any, Tensor]:
    """A model of one layer, an adapted copy of which the vectors alone are trained, and an input."""
    make, shape = LAYERS[name]
    return *pair(lambda: nn.Sequential(make()), ["0"], dtype, r=4), normal(1, *shape, dtype=dtype)


@layers
def test_outputs_can_be_modified_in_place(name: str) -> None:
    base, model, x = frozen(name)
    vectors = model[0].hra_u["default"]
    output, plain = model(x), run_dense(base, model, x)
    output[:, 0] = 0
    output.add_(1).relu_()
    wanted = (torch.cat([torch.zeros_like(plain[:, :1]), plain[:, 1:]], dim=1) + 1).relu()
    assert relative_error(output, wanted) < 1e-12
    found, sought = (torch.autograd.grad(one.sum(), vectors)[0] for one in (output, wanted))
    assert relative_error(found, sought) < 1e-10


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_with_and_without_gradients(name: str, dtype: torch.dtype) -> None:
    """So that a loaded adapter can be compared with the saved one."""
    _, model, x = frozen(name, dtype)
    trained = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), trained)
    if name == "Linear":
        assert torch.equal(model.requires_grad_(False)(x), trained)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_memory_format_of_the_output_is_that_of_the_layer(with_gradient: bool) -> None:
    base, model, x = frozen("Conv2d")
    model, x = (one.to(memory_format=torch.channels_last) for one in (model, x))
    with torch.set_grad_enabled(with_gradient):
        found = model(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, run_dense(base, model, x)) < 1e-12


@pytest.mark.parametrize("name", ["Linear", "Linear, many rows"])
@pytest.mark.parametrize("trained", [False, True])
def test_second_derivatives_of_a_layer_that_is_called_twice(name: str, trained: bool) -> None:
    base, model, x = frozen(name)
    model[0].hra_base.requires_grad_(trained)
    vectors = model[0].hra_u["default"]

    def loss(call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(torch.tanh(call(x)).repeat_interleave(2, dim=-1)).square().sum()

    calls = model, lambda x: run_dense(base, model, x)
    found, sought = (torch.autograd.grad(loss(call), vectors, create_graph=True)[0] for call in calls)
    assert relative_error(found, sought) < 1e-10
    again, wanted = (torch.autograd.grad(one.square().sum(), vectors)[0] for one in (found, sought))
    assert relative_error(again, wanted) < 1e-9


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_in_a_batch(trained: bool) -> None:
    _, model, _ = frozen("Linear")
    x = normal(1, 2, 48)
    model[0].hra_base.requires_grad_(trained)
    found = torch.autograd.functional.jacobian(model, x, vectorize=True)
    turned = model[0].hra_base @ dense_q(model[0].hra_u["default"])
    for row in range(2):
        assert relative_error(found[row, :, row], turned) < 1e-12
