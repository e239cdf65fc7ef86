"""The factors of chains in one autograd node, and what a layer computes with them, against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import BF16, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor
from torch.autograd import forward_ad

from hra_fx.kernels.factors import Factors, wy_factors
from hra_fx.kernels.linear import reflect_rows

quick = settings(max_examples=40, deadline=None, derandomize=True)


def leaf(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return normal(seed, *shape, dtype=dtype).requires_grad_()


def q_of(vectors: Tensor) -> Tensor:
    """`Q` of each chain of a batch, from its factors: `x Q^T = x + (x F^T) R`."""
    rows, down = wy_factors(vectors).unbind(-3)
    return torch.eye(vectors.shape[-2], dtype=vectors.dtype) + rows.mT @ down


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
    one, tangent = normal(2, 5, 3), normal(3, 5, 3)
    each = torch.func.jacfwd(q_of)(one)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(q_of(forward_ad.make_dual(one, tangent))).tangent
    assert relative_error(pushed, (each * tangent).sum((-1, -2))) < 1e-12
    step = 1e-6
    moved = (dense_q(one + step * tangent) - dense_q(one - step * tangent)) / (2 * step)
    assert relative_error(pushed, moved) < 1e-8


def test_under_autocast_products_are_narrow_and_rows_are_not() -> None:
    x, vectors = leaf(1, 6, 64, dtype=F32), leaf(2, 64, 4, dtype=F32)

    def reflected(u: Tensor) -> Tensor:
        rows, down = wy_factors(u)
        assert rows.dtype is F32
        return reflect_rows(x, Factors(rows.to(BF16), down.to(BF16)))

    with torch.autocast("cpu", dtype=BF16):
        y = reflected(vectors)
        # What is added to the rows is small where the reflections do little: the rows themselves keep their digits.
        assert relative_error(reflected(vectors.detach()[:, :1].repeat(1, 2)), x) < 1e-6
    assert y.dtype == F32
    assert relative_error(y, x.double() @ dense_q(vectors).mT) < 5e-3
