"""`T` and Gram-Schmidt by matrix products, against dense products and the recurrence in float64, with gradients."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_gs, dense_product, relative_error
from torch import Tensor

from hra_fx.functional import exportable, householder

F64 = torch.float64
WIDTH = 96
RANKS = (1, 3, 8, 17, 64)
#: How far the columns are from being parallel.
APART = (1.0, 1e-2, 1e-5, 1e-9, 0.0)


def chain(rank: int, apart: float) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    common, own = (torch.randn(WIDTH, k, dtype=F64, generator=generator) for k in (1, rank))
    return own if apart == 1.0 else common + apart * own


def q_by_products(vectors: Tensor) -> Tensor:
    unit = householder.normalize(vectors)
    return torch.eye(WIDTH, dtype=vectors.dtype) - unit @ exportable.compact_wy(unit) @ unit.mT


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("apart", APART)
def test_doubling_is_the_dense_product(rank: int, apart: float) -> None:
    vectors = chain(rank, apart)
    # Where a triangular solve has 1.1e-13 at worst (rank 64, 0.01 apart).
    assert relative_error(q_by_products(vectors), dense_product(vectors)) < 2e-14


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("apart", APART)
def test_doubling_in_float32_is_as_orthogonal_as_the_triangular_solve(rank: int, apart: float) -> None:
    vectors = householder.normalize(chain(rank, apart).float())
    errors = []
    for factor in (exportable.compact_wy(vectors), householder.compact_wy(vectors)):
        q = torch.eye(WIDTH, dtype=F64) - vectors.double() @ factor.double() @ vectors.double().mT
        errors.append(relative_error(q, dense_product(vectors)))
    assert errors[0] < max(2 * errors[1], rank * 2e-7)


@pytest.mark.parametrize("rank", [1, 3, 8, 32, 64])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5])
def test_the_gradient_is_that_of_the_dense_product(rank: int, apart: float) -> None:
    upstream = torch.randn(WIDTH, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(1))
    grads = []
    for function in (q_by_products, dense_product):
        vectors = chain(rank, apart).requires_grad_()
        grads += torch.autograd.grad((function(vectors) * upstream).sum(), vectors)
    assert relative_error(grads[0], grads[1]) < 1e-12


def test_a_column_of_zeros_is_the_identity_with_a_finite_gradient() -> None:
    vectors = chain(4, 1.0)
    vectors[:, 2] = 0
    vectors.requires_grad_()
    made = q_by_products(vectors)
    assert relative_error(made, dense_product(vectors)) < 1e-14
    (grad,) = torch.autograd.grad(made.square().mean(), vectors)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gram_schmidt_is_orthonormal_to_the_rounding_and_the_basis_of_the_recurrence(
    condition: float, dtype: torch.dtype
) -> None:
    left, right = (torch.linalg.qr(chain(16, 1.0)[:rows]).Q for rows in (WIDTH, 16))
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), 16, dtype=F64)
    vectors = (left @ torch.diag(values) @ right).to(dtype)
    basis = exportable.gram_schmidt(householder.normalize(vectors)).double()
    precision = torch.finfo(dtype).eps
    # Past 1 / eps there is no such basis.
    if condition * precision < 0.1:
        assert relative_error(basis, dense_gs(vectors)) < 40 * condition * precision
    assert relative_error(basis.mT @ basis, torch.eye(16, dtype=F64)) < 10 * precision


def test_the_gradient_of_gram_schmidt_is_that_of_the_recurrence() -> None:
    upstream = torch.randn(WIDTH, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    grads = []
    for function in (lambda vectors: exportable.gram_schmidt(householder.normalize(vectors)), dense_gs):
        vectors = chain(8, 1.0).requires_grad_()
        grads += torch.autograd.grad((function(vectors) * upstream).sum(), vectors)
    assert relative_error(grads[0], grads[1]) < 1e-13
