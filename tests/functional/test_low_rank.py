"""The LoRA form of a chain against the dense product `W Q - W` and its dense SVD, in float64."""

from __future__ import annotations

import pytest
import torch
from functional.test_householder import quick, seeds
from hypothesis import given, strategies as st
from one_layer import F64, normal
from oracles import dense_product, relative_error
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.functional.low_rank import LowRankDelta, core, low_rank_delta, rounding_error

sizes = st.integers(1, 12)


def change_of(weight: Tensor, chain: Tensor, rank: int | None = None, noise: float = 0.0) -> LowRankDelta:
    V, K = core(chain, noise)
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


@pytest.mark.parametrize(("r", "apply_GS", "wanted"), [(8, False, 8), (3, False, 4), (8, True, 16), (1, False, 2)])
def test_the_rank_of_an_adapter(r: int, apply_GS: bool, wanted: int) -> None:
    torch.manual_seed(0)
    start, anchor = householder.init_vectors(40, r, apply_GS=apply_GS, init_weights=True)
    weight = normal(0, 30, 40)

    def ranks(vectors: Tensor) -> int:
        chain = householder.orthonormalize(vectors.double()) if apply_GS else vectors.double()
        chain = chain if anchor is None else torch.cat([anchor.double(), chain], dim=1)
        return len(change_of(weight, chain, noise=2 * r * torch.finfo(torch.float32).eps * apply_GS).A)

    assert ranks(start) == 0
    assert ranks(start + 0.1 * normal(1, 40, r)) == wanted


def test_a_rotation_within_the_noise_is_the_identity() -> None:
    first, other = normal(0, 16, 1), normal(1, 16, 1)
    chain = torch.cat([first, first + 1e-8 * other], dim=1)
    size = float(torch.linalg.matrix_norm(dense_product(chain) - torch.eye(16, dtype=F64), 2))
    assert core(chain, 0.9 * size)[1].shape == (2, 2)
    assert core(chain, 1.1 * size)[1].shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rounding_error_is_that_of_the_product(dtype: torch.dtype) -> None:
    A, B = normal(0, 5, 30), normal(1, 20, 5)
    wanted = relative_error(B.to(dtype).double() @ A.to(dtype).double(), B @ A)
    assert rounding_error(A, B, dtype) == pytest.approx(wanted, rel=1e-6)
    assert rounding_error(A[:0], B[:, :0], dtype) == 0
