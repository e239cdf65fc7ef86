"""The pure functions of hra_fx.functional.householder against explicit float64 matrices, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import dense_gs, dense_product, relative_error
from torch import Tensor

from hra_fx.functional.householder import (
    anchor,
    compact_wy,
    dependence,
    normalize,
    orthonormalize,
    principal_block,
    reflect,
    rotate,
    start,
    working_dtype,
)

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 24)
ranks = st.integers(1, 33)
exponents = st.integers(-60, 60)
quick = settings(max_examples=40, deadline=None, derandomize=True)

TABLE = [(1, 1), (1, 5), (2, 33), (7, 1), (7, 2), (7, 7), (7, 9), (16, 33), (33, 32), (64, 33)]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def explicit(chain: Tensor) -> Tensor:
    """`I - U T U^T` with the library's `T`, everything else in float64."""
    wide = chain.double()
    return torch.eye(chain.shape[0], dtype=torch.float64) - wide @ compact_wy(chain).double() @ wide.mT


def orthogonality(q: Tensor) -> float:
    q = q.detach().double()
    return float((q.mT @ q - torch.eye(q.shape[1], dtype=torch.float64)).norm())


# compact_wy


@pytest.mark.parametrize(("d", "r"), TABLE)
def test_compact_wy_is_the_product_of_reflections(d: int, r: int) -> None:
    chain = normal(1, d, r)
    assert relative_error(explicit(chain), dense_product(chain)) < 1e-12
    assert torch.equal(compact_wy(chain), compact_wy(chain).triu())


@quick
@given(widths, ranks, seeds)
def test_compact_wy_is_orthogonal_with_the_parity_of_the_rank(d: int, r: int, seed: int) -> None:
    q = explicit(normal(seed, d, r))
    assert orthogonality(q) < 1e-10
    assert float(torch.linalg.det(q)) == pytest.approx((-1) ** r, abs=1e-9)


@quick
@given(widths, ranks, seeds, st.data())
def test_compact_wy_does_not_depend_on_the_scale_of_a_column(d: int, r: int, seed: int, data: st.DataObject) -> None:
    chain = normal(seed, d, r)
    scales = torch.tensor([2.0**e for e in data.draw(st.lists(exponents, min_size=r, max_size=r))]).double()
    assert relative_error(explicit(chain * scales), dense_product(chain)) < 1e-10


@quick
@given(widths, ranks, seeds)
def test_compact_wy_of_a_reversed_chain_is_the_inverse(d: int, r: int, seed: int) -> None:
    chain = normal(seed, d, r)
    assert relative_error(explicit(chain.flip(1)), explicit(chain).mT) < 1e-10


@pytest.mark.parametrize("r", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compact_wy_gradient(r: int, dtype: torch.dtype) -> None:
    chain = normal(3, 12, r, dtype=dtype).requires_grad_()
    upstream = normal(4, 12, 12)
    wanted = torch.autograd.grad((dense_product(chain) * upstream).sum(), chain)[0]
    got = torch.autograd.grad((explicit(chain) * upstream).sum(), chain)[0]
    assert got.dtype == dtype
    assert relative_error(got, wanted) < (1e-11 if dtype == torch.float64 else 1e-5)


def test_compact_wy_second_derivative() -> None:
    chain = normal(5, 4, 3).requires_grad_()
    x = normal(6, 2, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, u: reflect(x, u, compact_wy(u)), (x, chain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_zero_column_is_the_identity_and_its_gradient_finite(position: int, dtype: torch.dtype) -> None:
    chain = normal(7, 9, 5, dtype=dtype)
    chain[:, position] = 0
    without = torch.cat([chain[:, :position], chain[:, position + 1 :]], dim=1)
    chain.requires_grad_()
    q = explicit(chain)
    assert relative_error(q, dense_product(without)) < (1e-12 if dtype == torch.float64 else 1e-6)
    (q * normal(8, 9, 9)).sum().backward()  # type: ignore[no-untyped-call]
    assert chain.grad is not None
    assert bool(torch.isfinite(chain.grad).all())


def test_all_columns_zero_is_the_identity() -> None:
    chain = torch.zeros(4, 3, requires_grad=True)
    x = normal(9, 2, 4, dtype=torch.float32)
    y = reflect(x, chain, compact_wy(chain))
    assert torch.equal(y, x)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert chain.grad is not None
    assert bool(torch.isfinite(chain.grad).all())


@pytest.mark.parametrize("scale", [1e-17, 1e-12, 1e-3, 1e6, 1e15, 1e17])
def test_float32_columns_of_any_normal_size(scale: float) -> None:
    chain = normal(10, 32, 6, dtype=torch.float32)
    chain[:, ::2] *= scale
    chain.requires_grad_()
    x = normal(11, 5, 32, dtype=torch.float32)
    y = reflect(x, chain, compact_wy(chain))
    assert relative_error(y, x.double() @ dense_product(chain).mT) < 1e-5
    y.square().mean().backward()  # type: ignore[no-untyped-call]
    assert chain.grad is not None
    assert bool(torch.isfinite(chain.grad).all())


def test_a_float32_column_whose_square_underflows_is_the_identity() -> None:
    """The documented limit: |u|^2 below the smallest normal float32 has no usable inverse."""
    chain = normal(12, 8, 3, dtype=torch.float32)
    chain[:, 1] = 1e-20
    chain.requires_grad_()
    q = explicit(chain)
    assert relative_error(q, dense_product(chain[:, ::2])) < 1e-6
    q.sum().backward()  # type: ignore[no-untyped-call]
    assert chain.grad is not None
    assert bool(torch.isfinite(chain.grad).all())


@pytest.mark.parametrize("scale", [1e-20, 1e15, 1e-100, 1e100])
def test_float64_columns_of_extreme_size(scale: float) -> None:
    chain = normal(13, 32, 6)
    chain[:, 1::2] *= scale
    assert relative_error(explicit(chain), dense_product(chain)) < 1e-12


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("r", [32, 64])
def test_near_parallel_columns_in_float32(r: int, noise: float) -> None:
    """Where the product form (I - N)(I + N^2)... is off by 4e5. How much is lost depends on the processor's kernels."""
    chain = normalize(normal(14, 128, 1, dtype=torch.float32) + noise * normal(15, 128, r, dtype=torch.float32))
    x = normal(16, 4, 128, dtype=torch.float32)
    y = reflect(x, chain, compact_wy(chain))
    assert relative_error(y, x.double() @ dense_product(chain).mT) < 1e-3
    assert orthogonality(explicit(chain)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_factor_is_float32_at_least(dtype: torch.dtype) -> None:
    chain = normal(17, 8, 3).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert working_dtype(dtype) == expected
    assert compact_wy(chain).dtype == expected
    assert orthonormalize(chain).dtype == expected
    assert relative_error(explicit(chain), dense_product(chain)) < 1e-6


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_factor_nor_the_basis(narrow: torch.dtype) -> None:
    chain = normal(18, 32, 8, dtype=torch.float32)
    outside, basis = compact_wy(chain), orthonormalize(chain)
    with torch.autocast("cpu", dtype=narrow):
        assert (chain.mT @ chain).dtype == narrow
        inside, basis_inside = compact_wy(chain), orthonormalize(chain)
        assert (chain.mT @ chain).dtype == narrow
    assert torch.equal(inside, outside)
    assert torch.equal(basis_inside, basis)


def test_compact_wy_on_meta_tensors_keeps_shapes() -> None:
    chain = torch.empty(6, 3, device="meta")
    assert compact_wy(chain).shape == (3, 3)
    assert orthonormalize(chain).shape == (6, 3)


# reflect and rotate


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("r", [1, 4, 12])
def test_reflect_takes_any_leading_shape(shape: tuple[int, ...], r: int) -> None:
    chain = normal(19, 7, r)
    x = normal(20, *shape, 7)
    y = reflect(x, chain, compact_wy(chain))
    assert relative_error(y, x @ dense_product(chain).mT) < 1e-12


@quick
@given(widths, ranks, seeds)
def test_reflect_keeps_norms_and_inner_products(d: int, r: int, seed: int) -> None:
    chain, x = normal(seed, d, r), normal(seed + 1, 6, d)
    y = reflect(x, chain, compact_wy(chain))
    assert relative_error(y @ y.mT, x @ x.mT) < 1e-11


@quick
@given(widths, st.integers(1, 9), ranks, seeds)
def test_rotate_and_reflect_are_two_sides_of_one_product(d: int, out: int, r: int, seed: int) -> None:
    chain, weight, x = normal(seed, d, r), normal(seed + 1, out, d), normal(seed + 2, 3, d)
    factor = compact_wy(chain)
    rotated = rotate(weight, chain, factor)
    assert relative_error(rotated, weight @ dense_product(chain)) < 1e-11
    assert relative_error(x @ rotated.mT, reflect(x, chain, factor) @ weight.mT) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reflect_answers_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    chain = normal(21, 16, 4, dtype=torch.float32)
    x = normal(22, 3, 16).to(dtype)
    y = reflect(x, chain, compact_wy(chain))
    assert y.dtype == dtype
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert relative_error(y, x.double() @ dense_product(chain).mT) < bound


# orthonormalize and dependence


@quick
@given(widths, ranks, seeds)
def test_orthonormalize_is_gram_schmidt(d: int, r: int, seed: int) -> None:
    vectors = normal(seed, d, min(r, d))
    v = orthonormalize(vectors)
    triangle = v.mT @ vectors
    assert orthogonality(v) < 1e-12
    assert bool((triangle.diagonal() > 0).all())
    assert float(triangle.tril(-1).norm()) < 1e-12 * float(triangle.norm())
    assert relative_error(v @ triangle, vectors) < 1e-12


@pytest.mark.parametrize(("d", "r"), [(1, 1), (5, 1), (5, 5), (40, 8), (64, 33)])
def test_orthonormalize_and_its_gradient_equal_the_recurrence(d: int, r: int) -> None:
    vectors = normal(23, d, r).requires_grad_()
    upstream = normal(24, d, r)
    got, wanted = orthonormalize(vectors), dense_gs(vectors)
    assert relative_error(got, wanted) < 1e-10
    gradient = torch.autograd.grad((got * upstream).sum(), vectors)[0]
    wanted_gradient = torch.autograd.grad((wanted * upstream).sum(), vectors)[0]
    assert relative_error(gradient, wanted_gradient, floor=1.0) < 1e-9


def test_orthonormalize_survives_a_condition_number_that_breaks_the_classical_recurrence() -> None:
    left, right = (torch.linalg.qr(normal(seed, *shape)).Q for seed, shape in ((25, (64, 16)), (26, (16, 16))))
    vectors = (left * torch.logspace(0, -5, 16, dtype=torch.float64)) @ right.mT
    assert orthogonality(orthonormalize(vectors.float())) < 1e-5


def test_orthonormalize_does_not_depend_on_positive_scales() -> None:
    vectors = normal(27, 20, 6)
    scales = torch.tensor([1e-20, 1e15, 1.0, 1e-3, 1e7, 2.0], dtype=torch.float64)
    assert relative_error(orthonormalize(vectors * scales), orthonormalize(vectors)) < 1e-12


def test_gram_schmidt_is_a_chain_of_plain_reflections() -> None:
    vectors = normal(28, 20, 6)
    v = orthonormalize(vectors)
    projector = torch.eye(20, dtype=torch.float64) - 2 * v @ v.mT
    assert relative_error(explicit(v), projector) < 1e-13


def test_dependence() -> None:
    basis = torch.linalg.qr(normal(29, 12, 4)).Q
    assert dependence(basis) == pytest.approx(1.0)
    assert dependence(basis * torch.tensor([1.0, 10.0, 1.0, 1.0])) == pytest.approx(0.1)
    assert dependence(torch.cat([basis, basis[:, :1]], dim=1)) < 1e-15
    assert dependence(torch.zeros(12, 4)) == 0.0
    assert dependence(torch.nn.Parameter(basis.float())) == pytest.approx(1.0, rel=1e-6)


@quick
@given(st.integers(2, 24), st.integers(2, 24), seeds)
def test_dependence_is_between_zero_and_one(d: int, r: int, seed: int) -> None:
    vectors = normal(seed, d, min(r, d))
    assert 0 < dependence(vectors) <= 1
    vectors[:, -1] = vectors[:, 0]
    assert dependence(vectors) < 1e-14


# start and anchor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 7, 8])
def test_anchor_and_start_make_the_identity(r: int, apply_GS: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vectors = start(30, r, apply_GS=apply_GS, init_weights=True, dtype=dtype)
    prefix = anchor(vectors, apply_GS=apply_GS)
    assert vectors.shape == (30, r)
    assert vectors.dtype == dtype
    assert vectors.is_contiguous()
    basis = dense_gs(vectors) if apply_GS else vectors
    product = dense_product(basis)
    if prefix is None:
        assert r % 2 == 0
        assert not apply_GS
    else:
        assert prefix.shape == (30, r if apply_GS else 1)
        assert prefix.dtype == dtype
        assert prefix.untyped_storage().data_ptr() != vectors.untyped_storage().data_ptr()
        product = dense_product(prefix) @ product
    assert orthogonality(product) < 1e-12
    assert relative_error(product, torch.eye(30).double()) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("r", [1, 2, 3, 8])
def test_a_start_without_pairs_draws_every_column(r: int) -> None:
    for apply_GS, init_weights in ((True, True), (True, False), (False, False)):
        vectors = start(16, r, apply_GS=apply_GS, init_weights=init_weights)
        assert dependence(vectors) > 1e-3


def test_the_entries_of_a_start_lie_within_kaimings_bound() -> None:
    """kaiming_uniform_(a=sqrt(5)) on (d, m): |entry| < sqrt(6 / ((1 + 5) m)) = 1 / sqrt(m), m the drawn columns."""
    paired = start(4000, 8, apply_GS=False, init_weights=True)
    single = start(4000, 8, apply_GS=True, init_weights=True)
    for vectors, drawn in ((paired, 4), (single, 8)):
        bound = 1 / math.sqrt(drawn)
        assert 0.99 * bound < float(vectors.abs().max()) <= bound


# principal_block


@quick
@given(widths, st.integers(1, 30), seeds)
def test_principal_block_holds_all_that_the_product_does(d: int, r: int, seed: int) -> None:
    chain = normal(seed, d, r)
    block = principal_block(chain, compact_wy(chain))
    q = dense_product(chain)
    assert block.shape == (min(d, r),) * 2
    assert orthogonality(block) < 1e-10
    eye = torch.eye(d, dtype=torch.float64)
    distance = float((block - torch.eye(min(d, r), dtype=torch.float64)).norm())
    assert distance == pytest.approx(float((q - eye).norm()), abs=1e-10)
    traces = float(block.trace()) + d - min(d, r), float(q.trace())
    assert traces[0] == pytest.approx(traces[1], abs=1e-9)


def test_principal_block_shows_the_error_of_a_rough_factor() -> None:
    chain = normal(30, 40, 8)
    rough = compact_wy(chain).bfloat16()
    q = torch.eye(40, dtype=torch.float64) - chain @ rough.double() @ chain.mT
    assert orthogonality(principal_block(chain, rough)) == pytest.approx(orthogonality(q), rel=1e-9)
