"""Statistics of chains against dense matrices. Angles are tested with the report (tests/reporting/test_rows.py)."""

from __future__ import annotations

import pytest
import torch
from functional.test_householder import F64, normal, orthogonality, quick, seeds, widths
from hypothesis import given, strategies as st
from oracles import dense_product

from hra_fx.functional.householder import compact_wy
from hra_fx.functional.statistics import inverse_condition, principal_block


@quick
@given(widths, st.integers(1, 30), seeds)
def test_principal_block_has_the_distance_and_the_trace_of_the_product(d: int, r: int, seed: int) -> None:
    chain = normal(seed, d, r)
    block = principal_block(chain, compact_wy(chain))
    q = dense_product(chain)
    size = min(d, r)
    assert block.shape == (size, size)
    assert orthogonality(block) < 1e-10
    distance = float((block - torch.eye(size, dtype=F64)).norm())
    assert distance == pytest.approx(float((q - torch.eye(d, dtype=F64)).norm()), abs=1e-10)
    assert float(block.trace()) + d - size == pytest.approx(float(q.trace()), abs=1e-9)


def test_principal_block_shows_the_error_of_a_rounded_factor() -> None:
    chain = normal(30, 40, 8)
    rounded = compact_wy(chain).bfloat16()
    q = torch.eye(40, dtype=F64) - chain @ rounded.double() @ chain.mT
    assert orthogonality(principal_block(chain, rounded)) == pytest.approx(orthogonality(q), rel=1e-9)


def test_inverse_condition() -> None:
    basis = torch.linalg.qr(normal(29, 12, 4)).Q
    assert inverse_condition(basis) == pytest.approx(1.0)
    assert inverse_condition(basis * torch.tensor([1.0, 10.0, 1.0, 1.0])) == pytest.approx(0.1)
    assert inverse_condition(torch.cat([basis, basis[:, :1]], dim=1)) < 1e-15
    assert inverse_condition(torch.zeros(12, 4)) == 0.0
    assert inverse_condition(torch.nn.Parameter(basis.float())) == pytest.approx(1.0, rel=1e-6)


@quick
@given(st.integers(2, 24), st.integers(2, 24), seeds)
def test_inverse_condition_is_between_zero_and_one(d: int, r: int, seed: int) -> None:
    vectors = normal(seed, d, min(r, d))
    assert 0 < inverse_condition(vectors) <= 1
    vectors[:, -1] = vectors[:, 0]
    assert inverse_condition(vectors) < 1e-14
