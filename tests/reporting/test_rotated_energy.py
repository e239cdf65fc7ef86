"""The share of a weight that turns, against dense projectors in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import dense_product, dense_q
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx import HRAConfig, report, transform
from hra_fx.functional.rotated_energy import rotated_energy

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def oracle_share(weight: Tensor, q: Tensor) -> float:
    """`W: (out, d)` on the complement of what `Q` leaves: the eigenvectors of the symmetric `(Q - I)^T (Q - I)`."""
    moved = q - torch.eye(q.shape[0], dtype=F64)
    sizes, vectors = torch.linalg.eigh(moved.mT @ moved)
    basis = vectors[:, sizes > 1e-12]
    projector = basis @ basis.mT
    wide = weight.detach().double()
    return float((wide @ projector).square().sum() / wide.square().sum())


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(14, 9),
    "conv": lambda: nn.Conv2d(3, 8, (3, 2)),
    "conv with groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv3d": lambda: nn.Conv3d(2, 4, (2, 2, 3)),
    "gpt-2": lambda: Conv1D(9, 14),
    "attention": lambda: nn.MultiheadAttention(12, 3),
}


def as_rows(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer._parameters["in_proj_weight"].detach().double()  # type: ignore[union-attr]
    weight: Any = layer._parameters["weight"]
    return weight.detach().double().T if isinstance(layer, Conv1D) else weight.detach().double().flatten(1)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, dtype: torch.dtype, r: int, apply_GS: bool) -> None:
    torch.manual_seed(0)
    config = HRAConfig(r=r, apply_GS=apply_GS, target_modules=["layer"])
    model: Any = transform(Holder(LAYERS[kind]()).to(dtype), config)
    (before,) = report(model)
    assert before.share == 0.0
    reflection = model.layer.hra_u
    with torch.no_grad():
        reflection["default"].add_(0.2 * normal(r, *reflection["default"].shape))
    anchor = reflection.anchor("default")
    q = dense_q(reflection["default"].detach(), apply_GS=apply_GS, anchor=None if anchor is None else anchor.double())
    (row,) = report(model)
    assert 0 < row.share < 1
    assert row.share == pytest.approx(oracle_share(as_rows(model.layer), q), rel=1e-9 if dtype == F64 else 1e-4)


@pytest.mark.parametrize(("d", "k"), [(5, 5), (4, 9), (3, 12)])
def test_as_many_reflections_as_dimensions_get_hold_of_all(d: int, k: int) -> None:
    weight, chain = normal(1, 6, d), normal(2, d, k)
    assert rotated_energy(weight, chain) == pytest.approx(oracle_share(weight, dense_product(chain)))
    assert rotated_energy(weight, chain) <= 1


def test_a_weight_that_is_read_in_pieces() -> None:
    weight, chain = normal(1, 3000, 2000).float(), normal(2, 2000, 3)
    basis = torch.linalg.qr(chain).Q
    wanted = float((weight.double() @ basis).square().sum() / weight.double().square().sum())
    assert rotated_energy(weight, chain) == pytest.approx(wanted, rel=1e-5)


def test_what_cancels_is_not_turned() -> None:
    chain = torch.zeros(6, 4)
    chain[0, :2], chain[1, 2], chain[2, 3] = 1.0, 1.0, 1.0
    assert rotated_energy(torch.eye(6), chain) == pytest.approx(2 / 6)


def test_a_weight_of_zeros_has_no_share_and_none_that_is_not_finite_a_number() -> None:
    chain = normal(0, 4, 2)
    assert rotated_energy(torch.zeros(3, 4), chain) == 0.0
    assert math.isnan(rotated_energy(torch.full((3, 4), math.nan), chain))
    assert math.isnan(rotated_energy(torch.ones(3, 4), torch.full((4, 2), math.inf)))


def test_without_data_it_is_not_a_number() -> None:
    model: Any = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False))
    assert report(model).rows[0].share > 0
    model.to("meta")
    (row,) = report(model)
    assert math.isnan(row.share)
    assert math.isnan(row.angle)
    assert (row.d, row.r) == (6, 2)


def test_a_weight_that_was_quantized_since_is_not_read() -> None:
    model: Any = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False))
    model[0]._parameters["weight"] = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    (row,) = report(model)
    assert math.isnan(row.share)
    assert row.angle > 0
    model[0]._parameters["weight"] = nn.Parameter(torch.ones(12, 1), requires_grad=False)  # packed
    assert math.isnan(report(model).rows[0].share)
    del model[0]._parameters["weight"]
    assert math.isnan(report(model).rows[0].share)


def test_of_a_merged_weight_the_one_before_counts() -> None:
    model: Any = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False))
    before = report(model).rows[0].share
    hra_fx.merge_adapter(model)
    assert report(model).rows[0].share == before


def test_a_width_whose_square_would_fit_no_memory() -> None:
    """`Q` of 200,000 x 200,000 would take 320 GB."""
    model: Any = transform(
        nn.Sequential(nn.Linear(200_000, 2)), HRAConfig(r=3, target_modules=["0"], init_weights=False)
    )
    (row,) = report(model)
    assert len(row.angles) == 2
    assert 0 < row.share < 1e-3


def test_each_adapter_has_a_share_of_its_own() -> None:
    model: Any = transform(
        nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False), "a"
    )
    hra_fx.add_adapter(model, "b", HRAConfig(r=4, target_modules=["0"], init_weights=False))
    weight = model[0].weight.detach()
    for row in report(model):
        q = dense_q(model[0].hra_u[row.adapter].detach())
        assert row.share == pytest.approx(oracle_share(weight, q), rel=1e-4)
