"""How much a chain changes a weight, against dense projectors in float64; `test_rows.py` has all layers."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import dense_product
from reporting.made import oracle_share
from torch import Tensor

from hra_fx.functional.rotated_energy import weight_change


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d", "k"), [(5, 5), (4, 9), (3, 12)])
def test_as_many_reflections_as_dimensions(d: int, k: int) -> None:
    weight, chain = normal(1, 6, d), normal(2, d, k)
    assert weight_change(weight, chain).share == pytest.approx(oracle_share(weight, dense_product(chain)))
    assert weight_change(weight, chain).share <= 1
    moved = weight @ dense_product(chain) - weight
    assert weight_change(weight, chain).change == pytest.approx(float(moved.norm() / weight.norm()))


def test_a_weight_that_is_cast_in_pieces() -> None:
    weight, chain = normal(1, 3000, 2000).float(), normal(2, 2000, 3)
    basis = torch.linalg.qr(chain).Q
    wanted = float((weight.double() @ basis).square().sum() / weight.double().square().sum())
    assert weight_change(weight, chain).share == pytest.approx(wanted, rel=1e-5)


def test_reflections_that_cancel_do_not_count() -> None:
    chain = torch.zeros(6, 4)
    chain[0, :2], chain[1, 2], chain[2, 3] = 1.0, 1.0, 1.0
    assert weight_change(torch.eye(6), chain).share == pytest.approx(2 / 6)


def test_zeros_nan_and_infinity() -> None:
    chain = normal(0, 4, 2)
    assert weight_change(torch.zeros(3, 4), chain) == (0.0, 0.0)
    assert all(map(math.isnan, weight_change(torch.full((3, 4), math.nan), chain)))
    assert all(map(math.isnan, weight_change(torch.ones(3, 4), torch.full((4, 2), math.inf))))
