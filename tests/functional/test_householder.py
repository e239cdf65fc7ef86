"""The pure functions of hra_fx.functional.householder against explicit float64 matrices, and their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import F32, F64, normal
from oracles import dense_gs, dense_product, relative_error
from torch import Tensor

from hra_fx.functional.householder import compact_wy, normalize, orthonormalize

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 24)
ranks = st.integers(1, 33)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def explicit(chain: Tensor) -> Tensor:
    """`I - U T U^T` with the library's `T`, everything else in float64."""
    wide = chain.double()
    return torch.eye(chain.shape[0], dtype=F64) - wide @ compact_wy(chain).double() @ wide.mT


def orthogonality(q: Tensor) -> float:
    q = q.detach().double()
    return float((q.mT @ q - torch.eye(q.shape[1], dtype=F64)).norm())


# compact_wy


@quick
@given(d=widths, r=ranks, seed=seeds, data=st.data())
def test_compact_wy_is_the_product_of_reflections(d: int, r: int, seed: int, data: st.DataObject) -> None:
    """For vectors of any lengths, also zero; with its parity and gradient; and the reversed chain is the inverse."""
    exponents = data.draw(st.lists(st.integers(-60, 60) | st.none(), min_size=r, max_size=r))
    scales = torch.tensor([0.0 if e is None else 2.0**e for e in exponents]).double()
    chain = (normal(seed, d, r) * scales).requires_grad_()
    # A product of zero vectors alone is a constant.
    q, wanted = explicit(chain), dense_product(chain) + 0 * chain.sum()
    assert relative_error(q, wanted) < 1e-10
    assert torch.equal(compact_wy(chain), compact_wy(chain).triu())
    assert orthogonality(q) < 1e-10
    assert float(torch.linalg.det(q.detach())) == pytest.approx((-1) ** int(scales.count_nonzero()), abs=1e-9)
    assert relative_error(explicit(chain.flip(1)), q.mT) < 1e-10
    got, oracle = (torch.autograd.grad(one, chain, normal(seed + 1, d, d))[0] for one in (q, wanted))
    assert bool(got.isfinite().all())
    # In one dimension Q does not depend on the vectors.
    assert relative_error(got * scales, oracle * scales, floor=1e-1) < 1e-9


@pytest.mark.parametrize("noise", [1e-2, 1e-5, 0.0])
def test_near_parallel_columns_in_float32(noise: float) -> None:
    """The product form (I - N)(I + N^2)... has an error of 4e5 here. The bound allows for different CPU kernels."""
    chain = normalize(normal(14, 128, 1, dtype=F32) + noise * normal(15, 128, 64, dtype=F32))
    assert relative_error(explicit(chain), dense_product(chain)) < 1e-3
    assert orthogonality(explicit(chain)) < 2e-3


# orthonormalize


@quick
@given(d=widths, r=ranks, seed=seeds)
def test_orthonormalize_is_gram_schmidt(d: int, r: int, seed: int) -> None:
    vectors = normal(seed, d, min(r, d))
    v = orthonormalize(vectors)
    triangle = v.mT @ vectors
    assert orthogonality(v) < 1e-12
    assert bool((triangle.diagonal() > 0).all())
    assert float(triangle.tril(-1).norm()) < 1e-12 * float(triangle.norm())
    assert relative_error(v @ triangle, vectors) < 1e-12


@pytest.mark.parametrize(("d", "r"), [(1, 1), (5, 5), (64, 33)])
def test_orthonormalize_and_its_gradient_equal_the_recurrence(d: int, r: int) -> None:
    vectors = normal(23, d, r).requires_grad_()
    upstream = normal(24, d, r)
    got, wanted = orthonormalize(vectors), dense_gs(vectors)
    assert relative_error(got, wanted) < 1e-10
    gradient, wanted_gradient = (torch.autograd.grad((v * upstream).sum(), vectors)[0] for v in (got, wanted))
    assert relative_error(gradient, wanted_gradient, floor=1.0) < 1e-9


def test_orthonormalize_survives_a_condition_number_that_breaks_the_classical_recurrence() -> None:
    left, right = (torch.linalg.qr(normal(seed, *shape)).Q for seed, shape in ((25, (64, 16)), (26, (16, 16))))
    vectors = (left * torch.logspace(0, -5, 16, dtype=F64)) @ right.mT
    assert orthogonality(orthonormalize(vectors.float())) < 1e-5


def test_orthonormalize_does_not_depend_on_positive_scales() -> None:
    vectors = normal(27, 20, 6)
    scales = torch.tensor([1e-20, 1e15, 1.0, 1e-3, 1e7, 2.0], dtype=F64)
    assert relative_error(orthonormalize(vectors * scales), orthonormalize(vectors)) < 1e-12
