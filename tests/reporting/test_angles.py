"""Angles of a chain of reflections, and its change of a weight, against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import dense_product
from reporting.made import oracle_angles, oracle_share
from torch import Tensor

from hra_fx.functional.rotated_energy import relative_change
from hra_fx.functional.statistics import min_angle, rotation_stats
from hra_fx.reporting.row import change_of

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


@pytest.mark.parametrize(("d", "k"), [(5, 5), (4, 9), (3, 12)])
def test_as_many_reflections_as_dimensions(d: int, k: int) -> None:
    weight, chain = normal(1, 6, d), normal(2, d, k)
    assert relative_change(weight, chain).share == pytest.approx(oracle_share(weight, dense_product(chain)))
    assert relative_change(weight, chain).share <= 1
    moved = weight @ dense_product(chain) - weight
    assert relative_change(weight, chain).change == pytest.approx(float(moved.norm() / weight.norm()))


def test_a_weight_that_is_cast_in_pieces() -> None:
    weight, chain = normal(1, 3000, 2000).float(), normal(2, 2000, 3)
    basis = torch.linalg.qr(chain).Q
    wanted = float((weight.double() @ basis).square().sum() / weight.double().square().sum())
    assert relative_change(weight, chain).share == pytest.approx(wanted, rel=1e-5)


def test_reflections_that_cancel_do_not_count() -> None:
    chain = torch.zeros(6, 4)
    chain[0, :2], chain[1, 2], chain[2, 3] = 1.0, 1.0, 1.0
    assert relative_change(torch.eye(6), chain).share == pytest.approx(2 / 6)


def test_zeros_nan_and_infinity() -> None:
    chain = normal(0, 4, 2)
    assert relative_change(torch.zeros(3, 4), chain) == (0.0, 0.0)
    assert all(map(math.isnan, relative_change(torch.full((3, 4), math.nan), chain)))
    assert all(map(math.isnan, relative_change(torch.ones(3, 4), torch.full((4, 2), math.inf))))


def test_a_change_of_experts_is_that_of_all_together() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    chain = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    moved = [weight @ dense_product(vectors) - weight for weight, vectors in zip(rows, chain, strict=True)]
    wanted = float(torch.stack(moved).norm() / rows.norm())
    assert change_of(rows, chain).change == pytest.approx(wanted)
