"""Every angle of an adapter against the eigenvalues of the dense `Q`, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import dense_product, dense_q
from torch import Tensor, nn

import hra_fx
from hra_fx import HRAConfig, report, transform
from hra_fx.functional.statistics import min_angle, rotation_stats

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def oracle_angles(q: Tensor, floor: float = 1e-7) -> list[float]:
    """One angle for each plane and for a reflected direction that is left, from all `d` eigenvalues of `Q`."""
    phases = torch.linalg.eigvals(q).angle()
    # Of a plane that is turned by less than pi, one of its two eigenvalues is above the real line.
    inner = [float(phase) for phase in phases if floor < float(phase) < math.pi - floor]
    reflected = int((phases.abs() >= math.pi - floor).sum())
    return sorted([math.pi] * math.ceil(reflected / 2) + inner, reverse=True)


def check(chain: Tensor) -> None:
    found, angles = rotation_stats(chain), oracle_angles(dense_product(chain))
    assert found.angles == pytest.approx(angles, abs=1e-6), (len(found.angles), len(angles))
    assert found.mean_angle == pytest.approx(sum(angles) / len(angles) if angles else 0.0, abs=1e-6)
    assert found.angle == pytest.approx(max(angles, default=0.0), abs=1e-6)


@pytest.mark.parametrize("k", range(1, 12))
@pytest.mark.parametrize("d", [1, 2, 3, 8, 30])
def test_random_chains(d: int, k: int) -> None:
    """Odd and even numbers of reflections, and more of them than dimensions."""
    check(normal(100 * d + k, d, k))


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_near_parallel_pairs(k: int, scale: float) -> None:
    """What training looks like at its beginning: `k / 2` planes, each turned a little."""
    chain = normal(k, 20, k // 2).repeat_interleave(2, dim=1)
    chain = chain + scale * normal(k + 1, 20, k)
    angles = torch.linalg.eigvals(dense_product(chain)).angle().sort(descending=True).values
    planes = [float(angle) for angle in angles if angle > 1e-10]
    assert rotation_stats(chain).angles == pytest.approx(planes, rel=1e-6)
    assert len(planes) == k // 2


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("init_weights", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_adapters_with_and_without_anchor(r: int, init_weights: bool, apply_GS: bool) -> None:
    config = HRAConfig(r=r, apply_GS=apply_GS, init_weights=init_weights, target_modules=["0"])
    model: Any = transform(nn.Sequential(nn.Linear(12, 5, dtype=F64)), config)
    reflection = model[0].hra_u
    if init_weights:
        assert report(model).rows[0].angles == ()
    with torch.no_grad():
        reflection["default"].add_(0.1 * normal(r, 12, r))
    q = dense_q(reflection["default"].detach(), apply_GS=apply_GS, anchor=reflection.anchor("default"))
    (row,) = report(model).rows
    assert row.angles == pytest.approx(oracle_angles(q), abs=1e-6)
    assert row.mean_angle == pytest.approx(sum(row.angles) / len(row.angles))
    assert row.angle == row.angles[0]


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_gram_schmidt_without_an_anchor_turns_half_round(r: int) -> None:
    """`I - 2 V V^T` has `r` eigenvalues -1: planes of pi, and where `r` is odd one direction more."""
    config = HRAConfig(r=r, apply_GS=True, init_weights=False, target_modules=["0"])
    (row,) = report(transform(nn.Sequential(nn.Linear(9, 4)), config))
    assert row.angles == pytest.approx([math.pi] * ((r + 1) // 2))


def test_columns_of_zero_and_pairs_that_cancel_turn_nothing() -> None:
    vector = normal(3, 7, 1)
    assert rotation_stats(torch.zeros(7, 3, dtype=F64)).angles == ()
    assert rotation_stats(torch.cat([vector, vector], dim=1)).angles == ()
    assert rotation_stats(torch.cat([vector, torch.zeros(7, 1), -2 * vector], dim=1)).angles == ()
    assert rotation_stats(torch.cat([vector, torch.zeros(7, 1)], dim=1)).angles == pytest.approx([math.pi])


def test_two_planes_of_the_same_angle_are_two() -> None:
    chain = torch.zeros(6, 4, dtype=F64)
    for plane in (0, 1):
        chain[2 * plane, 2 * plane] = 1
        chain[2 * plane, 2 * plane + 1], chain[2 * plane + 1, 2 * plane + 1] = math.cos(0.2), math.sin(0.2)
    assert rotation_stats(chain).angles == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [2, 8, 32])
def test_rounding_at_the_start_is_no_angle(r: int, dtype: torch.dtype) -> None:
    chain = normal(r, 64, r // 2).to(dtype).repeat_interleave(2, dim=1)
    assert rotation_stats(chain).angles == ()
    assert rotation_stats(chain + 1e-2 * normal(5, 64, r).to(dtype)).angles


def test_an_angle_above_the_floor_is_one_and_one_below_is_none() -> None:
    def pair(angle: float) -> Tensor:
        return torch.tensor([[1.0, math.cos(angle / 2)], [0.0, math.sin(angle / 2)]], dtype=F64)

    floor = min_angle(pair(0.1))
    assert rotation_stats(pair(3 * floor)).angles == pytest.approx([3 * floor], rel=0.3)
    assert rotation_stats(pair(floor / 3)).angles == ()


@pytest.mark.parametrize("chain", [torch.full((4, 2), math.nan), torch.empty(4, 2, device="meta")], ids=["nan", "meta"])
def test_no_numbers_no_angles(chain: Tensor) -> None:
    found = rotation_stats(chain)
    assert [math.isnan(angle) for angle in found.angles] == [True]
    assert math.isnan(found.mean_angle)
    assert math.isnan(found.angle)


def test_scaled_merged_and_disabled_adapters() -> None:
    """A strength scales every angle; a merge and a pause leave the adapter what it is."""
    model: Any = transform(nn.Sequential(nn.Linear(12, 5, dtype=F64)), HRAConfig(r=4, target_modules=["0"]))
    with torch.no_grad():
        model[0].hra_u["default"].add_(0.1 * normal(1, 12, 4))
    (whole,) = report(model).rows
    hra_fx.merge_adapter(model)
    assert report(model).rows == (whole,)
    hra_fx.unmerge_adapter(model)
    with hra_fx.disable_adapters(model):
        assert report(model).rows == (whole,)
    hra_fx.set_scale(model, "default", 0.5)
    (half,) = report(model).rows
    assert half.angles == pytest.approx([angle / 2 for angle in whole.angles])
    assert half.share == pytest.approx(whole.share)
    hra_fx.set_scale(model, "default", 0.0)
    (none,) = report(model).rows
    assert (none.angles, none.mean_angle, none.share) == ((), 0.0, 0.0)
    assert (none.d, none.r) == (12, 4)
