"""Rotated weights, and their change as LoRA, against the dense product and its SVD in float64."""

from __future__ import annotations

import pytest
import torch
from functional.test_householder import quick, seeds
from hypothesis import given, strategies as st
from one_layer import F64, normal
from oracles import dense_product, relative_error
from torch import Tensor

from hra_fx.functional.low_rank import LowRankDelta, core, low_rank_delta
from hra_fx.functional.rotate import rotate_weight

SHAPES = [(5, 7), (4, 2, 3, 3), (4, 6, 3), (3, 2, 2, 1, 2)]


@quick
@given(st.sampled_from(SHAPES), st.booleans(), st.integers(1, 9), st.integers(-60, 60), seeds)
def test_it_is_the_dense_product_with_its_gradients(
    shape: tuple[int, ...], transposed: bool, k: int, scale: int, seed: int
) -> None:
    transposed = transposed and len(shape) == 2
    weight = normal(seed, *shape).requires_grad_()
    width = shape[0] if transposed else weight[0].numel()
    vectors = (normal(seed + 1, width, k) * 2.0**scale).requires_grad_()
    q = dense_product(vectors)
    wanted = q.mT @ weight if transposed else (weight.flatten(1) @ q).view(shape)
    rotated = rotate_weight(weight, vectors, transposed=transposed)
    assert rotated.is_contiguous()
    assert relative_error(rotated, wanted) < 1e-11
    upstream = normal(seed + 2, *shape)
    for tensor, factor in ((weight, 1.0), (vectors, 2.0**scale)):
        got, sought = (torch.autograd.grad(one, tensor, upstream, retain_graph=True)[0] for one in (rotated, wanted))
        assert relative_error(got * factor, sought * factor, floor=1e-3) < 1e-9


def test_the_wider_dtype_is_used() -> None:
    weight, vectors = normal(0, 5, 7), normal(1, 7, 2).float()
    assert relative_error(rotate_weight(weight, vectors), weight @ dense_product(vectors)) < 1e-14
    assert rotate_weight(weight.float(), vectors.double()).dtype == torch.float32


# As LoRA

sizes = st.integers(1, 12)


def change_of(weight: Tensor, chain: Tensor, rank: int | None = None) -> LowRankDelta:
    V, K = core(chain)
    return low_rank_delta(weight @ V, V, K, rank)


def dense_change(weight: Tensor, chain: Tensor) -> Tensor:
    return weight @ (dense_product(chain) - torch.eye(len(chain), dtype=F64))


@quick
@given(sizes, sizes, st.integers(0, 9), st.integers(-60, 60), st.integers(0, 2), seeds)
def test_it_is_the_dense_change_at_its_rank_and_balanced(
    out: int, d: int, k: int, scale: int, zeros: int, seed: int
) -> None:
    weight, chain = normal(seed, out, d), normal(seed + 1, d, k) * 2.0**scale
    chain[:, :zeros] = 0
    wanted = dense_change(weight, chain)
    A, B, error = change_of(weight, chain)
    assert relative_error(B @ A, wanted) < 1e-9
    assert error == 0
    assert len(A) == int(torch.linalg.matrix_rank(wanted, rtol=1e-9))
    assert relative_error(A @ A.mT, B.mT @ B) < 1e-9
    assert relative_error(A @ A.mT, torch.diag((A @ A.mT).diagonal())) < 1e-9


@quick
@given(st.integers(2, 9), st.integers(1, 9), seeds)
def test_a_smaller_rank_is_the_best_approximation_of_the_change(k: int, rank: int, seed: int) -> None:
    weight, chain = normal(seed, 14, 12), normal(seed + 1, 12, k)
    wanted = dense_change(weight, chain)
    left, sigma, right = torch.linalg.svd(wanted)
    A, B, error = change_of(weight, chain, rank)
    best = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    assert len(A) == min(k, rank)
    assert relative_error(B @ A, best) < 1e-9
    assert error == pytest.approx(relative_error(best, wanted), abs=1e-9)


@pytest.mark.parametrize(("angle", "bound"), [(1e-2, 1e-12), (1e-5, 1e-9), (1e-8, 1e-6)])
def test_a_small_rotation_loses_no_accuracy(angle: float, bound: float) -> None:
    weight, first, other = normal(0, 20, 16), normal(1, 16, 1), normal(2, 16, 1)
    chain = torch.cat([first, first + angle * other], dim=1)
    A, B, _ = change_of(weight, chain)
    assert len(A) == 2
    assert relative_error(B @ A, dense_change(weight, chain)) < bound
