"""The pure functions of hra_fx.functional.householder against explicit float64 matrices, and their properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import dense_gs, dense_product, relative_error
from torch import Tensor

from hra_fx.functional.householder import (
    cholesky_basis,
    compact_wy,
    init_vectors,
    normalize,
    orthonormalize,
    reflect,
    rotate,
    working_dtype,
)

F32, F64 = torch.float32, torch.float64
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 24)
ranks = st.integers(1, 33)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def explicit(chain: Tensor) -> Tensor:
    """`I - U T U^T` with the library's `T`, everything else in float64."""
    wide = chain.double()
    return torch.eye(chain.shape[0], dtype=F64) - wide @ compact_wy(chain).double() @ wide.mT


def orthogonality(q: Tensor) -> float:
    q = q.detach().double()
    return float((q.mT @ q - torch.eye(q.shape[1], dtype=F64)).norm())


def backward_is_finite(loss: Tensor, chain: Tensor) -> bool:
    return bool(torch.isfinite(torch.autograd.grad(loss, chain)[0]).all())


# compact_wy


@quick
@given(widths, ranks, seeds, st.data())
def test_compact_wy_is_the_product_of_reflections(d: int, r: int, seed: int, data: st.DataObject) -> None:
    """For vectors of any lengths; with the parity of the rank; and the reversed chain is the inverse."""
    chain = normal(seed, d, r)
    scales = torch.tensor([2.0**e for e in data.draw(st.lists(st.integers(-60, 60), min_size=r, max_size=r))]).double()
    q = explicit(chain * scales)
    assert relative_error(q, dense_product(chain)) < 1e-10
    assert torch.equal(compact_wy(chain), compact_wy(chain).triu())
    assert orthogonality(q) < 1e-10
    assert float(torch.linalg.det(q)) == pytest.approx((-1) ** r, abs=1e-9)
    assert relative_error(explicit(chain.flip(1)), q.mT) < 1e-10


@pytest.mark.parametrize("r", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_compact_wy_gradient(r: int, dtype: torch.dtype) -> None:
    chain = normal(3, 12, r, dtype=dtype).requires_grad_()
    upstream = normal(4, 12, 12)
    wanted = torch.autograd.grad((dense_product(chain) * upstream).sum(), chain)[0]
    got = torch.autograd.grad((explicit(chain) * upstream).sum(), chain)[0]
    assert got.dtype == dtype
    assert relative_error(got, wanted) < (1e-11 if dtype == F64 else 1e-5)


def test_compact_wy_second_derivative() -> None:
    chain, x = normal(5, 4, 3).requires_grad_(), normal(6, 2, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, u: reflect(x, u, compact_wy(u)), (x, chain))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("zeros", [[0], [2], [4], [0, 1, 2, 3, 4]])
def test_a_zero_column_is_the_identity_and_its_gradient_is_finite(zeros: list[int], dtype: torch.dtype) -> None:
    chain = normal(7, 9, 5, dtype=dtype)
    chain[:, zeros] = 0
    rest = chain[:, [column for column in range(5) if column not in zeros]]
    chain.requires_grad_()
    q = explicit(chain)
    assert relative_error(q, dense_product(rest)) < (1e-12 if dtype == F64 else 1e-6)
    assert backward_is_finite((q * normal(8, 9, 9)).sum(), chain)


@pytest.mark.parametrize("scale", [1e-17, 1e-12, 1e-3, 1e6, 1e15, 1e17])
def test_float32_columns_of_any_normal_length(scale: float) -> None:
    chain = normal(10, 32, 6, dtype=F32)
    chain[:, ::2] *= scale
    chain.requires_grad_()
    x = normal(11, 5, 32, dtype=F32)
    y = reflect(x, chain, compact_wy(chain))
    assert relative_error(y, x.double() @ dense_product(chain).mT) < 1e-5
    assert backward_is_finite(y.square().mean(), chain)


def test_a_float32_column_whose_square_underflows_is_the_identity() -> None:
    """The documented limit: |u|^2 below the smallest normal float32 has no usable inverse."""
    chain = normal(12, 8, 3, dtype=F32)
    chain[:, 1] = 1e-20
    chain.requires_grad_()
    q = explicit(chain)
    assert relative_error(q, dense_product(chain[:, ::2])) < 1e-6
    assert backward_is_finite(q.sum(), chain)


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("r", [32, 64])
def test_near_parallel_columns_in_float32(r: int, noise: float) -> None:
    """The product form (I - N)(I + N^2)... has an error of 4e5 here. The bound allows for different CPU kernels."""
    chain = normalize(normal(14, 128, 1, dtype=F32) + noise * normal(15, 128, r, dtype=F32))
    x = normal(16, 4, 128, dtype=F32)
    y = reflect(x, chain, compact_wy(chain))
    assert relative_error(y, x.double() @ dense_product(chain).mT) < 1e-3
    assert orthogonality(explicit(chain)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
def test_the_factor_is_float32_at_least(dtype: torch.dtype) -> None:
    chain = normal(17, 8, 3).to(dtype)
    expected = F64 if dtype == F64 else F32
    assert working_dtype(dtype) == compact_wy(chain).dtype == orthonormalize(chain).dtype == expected
    assert relative_error(explicit(chain), dense_product(chain)) < 1e-6


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_factor_and_basis(narrow: torch.dtype) -> None:
    chain = normal(18, 32, 8, dtype=F32)
    outside, basis = compact_wy(chain), orthonormalize(chain)
    with torch.autocast("cpu", dtype=narrow):
        inside, basis_inside = compact_wy(chain), orthonormalize(chain)
        assert (chain.mT @ chain).dtype == narrow, "autocast is on again"
    assert torch.equal(inside, outside)
    assert torch.equal(basis_inside, basis)


# reflect and rotate


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3, 4), (2, 0, 4)])
def test_reflect_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    chain, x = normal(19, 7, 4), normal(20, *shape, 7)
    assert relative_error(reflect(x, chain, compact_wy(chain)), x @ dense_product(chain).mT) < 1e-12


@quick
@given(widths, st.integers(1, 9), ranks, seeds)
def test_rotate_and_reflect_are_two_sides_of_one_product(d: int, out: int, r: int, seed: int) -> None:
    chain, weight, x = normal(seed, d, r), normal(seed + 1, out, d), normal(seed + 2, 3, d)
    factor = compact_wy(chain)
    rotated = rotate(weight, chain, factor)
    assert relative_error(rotated, weight @ dense_product(chain)) < 1e-11
    assert relative_error(x @ rotated.mT, reflect(x, chain, factor) @ weight.mT) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
def test_reflect_returns_the_dtype_of_x(dtype: torch.dtype) -> None:
    chain, x = normal(21, 16, 4, dtype=F32), normal(22, 3, 16).to(dtype)
    y = reflect(x, chain, compact_wy(chain))
    assert y.dtype == dtype
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert relative_error(y, x.double() @ dense_product(chain).mT) < bound


# orthonormalize, on CPUs and as GPUs compute it

both = pytest.mark.parametrize("basis_of", [orthonormalize, cholesky_basis])


@both
@quick
@given(d=widths, r=ranks, seed=seeds)
def test_orthonormalize_is_gram_schmidt(basis_of: Any, d: int, r: int, seed: int) -> None:
    vectors = normal(seed, d, min(r, d))
    v = basis_of(vectors)
    triangle = v.mT @ vectors
    assert orthogonality(v) < 1e-12
    assert bool((triangle.diagonal() > 0).all())
    assert float(triangle.tril(-1).norm()) < 1e-12 * float(triangle.norm())
    assert relative_error(v @ triangle, vectors) < 1e-12
    assert relative_error(explicit(v), torch.eye(d, dtype=F64) - 2 * v @ v.mT) < 1e-12


@both
@pytest.mark.parametrize(("d", "r"), [(1, 1), (5, 1), (5, 5), (40, 8), (64, 33)])
def test_orthonormalize_and_its_gradient_equal_the_recurrence(basis_of: Any, d: int, r: int) -> None:
    vectors = normal(23, d, r).requires_grad_()
    upstream = normal(24, d, r)
    got, wanted = basis_of(vectors), dense_gs(vectors)
    assert relative_error(got, wanted) < 1e-10
    gradient, wanted_gradient = (torch.autograd.grad((v * upstream).sum(), vectors)[0] for v in (got, wanted))
    assert relative_error(gradient, wanted_gradient, floor=1.0) < 1e-9


@both
def test_orthonormalize_survives_a_condition_number_that_breaks_the_classical_recurrence(basis_of: Any) -> None:
    left, right = (torch.linalg.qr(normal(seed, *shape)).Q for seed, shape in ((25, (64, 16)), (26, (16, 16))))
    vectors = (left * torch.logspace(0, -5, 16, dtype=F64)) @ right.mT
    assert orthogonality(basis_of(vectors.float())) < 1e-5


@both
def test_orthonormalize_does_not_depend_on_positive_scales(basis_of: Any) -> None:
    vectors = normal(27, 20, 6)
    scales = torch.tensor([1e-20, 1e15, 1.0, 1e-3, 1e7, 2.0], dtype=F64)
    assert relative_error(basis_of(vectors * scales), basis_of(vectors)) < 1e-12


def test_a_failed_cholesky_factorization_is_not_a_number() -> None:
    vectors = normal(28, 3, 20, 4)
    vectors[1, :, 3] = 0
    basis = cholesky_basis(vectors)
    assert bool(basis[1].isnan().any())
    assert relative_error(basis[::2], orthonormalize(vectors[::2])) < 1e-12


# init_vectors


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 7, 8])
def test_initial_vectors_and_anchor_are_the_identity(r: int, apply_GS: bool, dtype: torch.dtype) -> None:
    vectors, anchor = init_vectors(30, r, apply_GS=apply_GS, init_weights=True, dtype=dtype)
    assert vectors.shape == (30, r)
    assert vectors.dtype == dtype
    assert vectors.is_contiguous()
    product = dense_product(dense_gs(vectors) if apply_GS else vectors)
    assert (anchor is None) == (r % 2 == 0 and not apply_GS)
    if anchor is not None:
        assert anchor.shape == (30, r if apply_GS else 1)
        assert anchor.dtype == dtype
        assert anchor.is_contiguous()
        assert anchor.untyped_storage().data_ptr() != vectors.untyped_storage().data_ptr()
        product = dense_product(anchor) @ product
    assert relative_error(product, torch.eye(30).double()) < (1e-12 if dtype == F64 else 1e-6)


def test_initial_vectors_without_pairs_are_independent_and_have_no_anchor() -> None:
    for apply_GS, init_weights in ((True, True), (True, False), (False, False)):
        vectors, anchor = init_vectors(16, 8, apply_GS=apply_GS, init_weights=init_weights)
        assert float(torch.linalg.svdvals(vectors).min()) > 1e-2
        assert (anchor is None) == (not init_weights)


def test_initial_vectors_are_within_the_bound_of_kaiming() -> None:
    """kaiming_uniform_(a=sqrt(5)) on (d, m): |entry| < sqrt(6 / ((1 + 5) m)) = 1 / sqrt(m), m the drawn columns."""
    for apply_GS, drawn in ((False, 4), (True, 8)):
        vectors, _ = init_vectors(4000, 8, apply_GS=apply_GS, init_weights=True)
        bound = 1 / math.sqrt(drawn)
        assert 0.99 * bound < float(vectors.abs().max()) <= bound
