"""Every rotation angle of a chain of reflections against the eigenvalues of the dense `Q`, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import dense_product
from reporting.made import oracle_angles
from torch import Tensor

from hra_fx.functional.statistics import min_angle, rotation_stats

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_random_chains(d: int, k: int, seed: int) -> None:
    """Odd and even numbers of reflections, also more than dimensions."""
    chain = normal(seed, d, k)
    q, found = dense_product(chain), rotation_stats(chain)
    angles = oracle_angles(q)
    assert found.angles == pytest.approx(angles, abs=1e-6), (len(found.angles), len(angles))
    assert found.mean_angle == pytest.approx(sum(angles) / len(angles) if angles else 0.0, abs=1e-6)
    assert found.angle == pytest.approx(max(angles, default=0.0), abs=1e-6)
    assert found.rotation == pytest.approx(float((q - torch.eye(d, dtype=F64)).norm()), rel=1e-10)


def test_zero_columns_and_pairs_that_cancel_rotate_nothing() -> None:
    vector = normal(3, 7, 1)
    assert rotation_stats(torch.zeros(7, 3, dtype=F64)).angles == ()
    assert rotation_stats(torch.cat([vector, vector], dim=1)).angles == ()
    assert rotation_stats(torch.cat([vector, torch.zeros(7, 1), -2 * vector], dim=1)).angles == ()
    assert rotation_stats(torch.cat([vector, torch.zeros(7, 1)], dim=1)).angles == pytest.approx([math.pi])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_at_the_start_is_not_an_angle(dtype: torch.dtype) -> None:
    for r in (2, 8, 32):
        chain = normal(r, 64, r // 2).to(dtype).repeat_interleave(2, dim=1)
        assert rotation_stats(chain).angles == ()
        assert rotation_stats(chain + 1e-2 * normal(5, 64, r).to(dtype)).angles


def test_angles_below_the_floor_are_left_out() -> None:
    def pair(angle: float) -> Tensor:
        return torch.tensor([[1.0, math.cos(angle / 2)], [0.0, math.sin(angle / 2)]], dtype=F64)

    floor = min_angle(pair(0.1))
    assert rotation_stats(pair(3 * floor)).angles == pytest.approx([3 * floor], rel=0.3)
    assert rotation_stats(pair(floor / 3)).angles == ()


@pytest.mark.parametrize("chain", [torch.full((4, 2), math.nan), torch.empty(4, 2, device="meta")], ids=["nan", "meta"])
def test_vectors_without_values_have_no_angles(chain: Tensor) -> None:
    found = rotation_stats(chain)
    assert [math.isnan(angle) for angle in found.angles] == [True]
    assert all(math.isnan(value) for value in (found.mean_angle, found.angle, found.rotation))
