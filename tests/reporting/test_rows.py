"""The values of a report's rows, its angles and shares, against dense products in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import dense_product, dense_q
from reporting.made import oracle_angles, oracle_share
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx import HRAConfig, report, transform
from hra_fx.functional.rotated_energy import relative_change
from hra_fx.functional.statistics import min_angle, rotation_stats
from hra_fx.reporting.row import change_of

F64 = torch.float64
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(14, 9),
    "conv": lambda: nn.Conv2d(3, 8, (3, 2)),
    "conv with groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv3d": lambda: nn.Conv3d(2, 4, (2, 2, 3)),
    "gpt-2": lambda: Conv1D(9, 14),
    "attention": lambda: nn.MultiheadAttention(12, 3),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def adapt(kind: str, dtype: torch.dtype, *, scale: float, **fields: Any) -> Any:
    """A model of one layer whose vectors were moved off their start by `scale`."""
    model: Any = transform(Holder(LAYERS[kind]()).to(dtype), HRAConfig(target_modules=["layer"], **fields))
    vectors = model.layer.hra_u["default"]
    with torch.no_grad():
        vectors.add_(scale * torch.randn(vectors.shape, dtype=F64, generator=torch.Generator().manual_seed(1)))
    return model


def one_linear(d: int = 6, **fields: Any) -> Any:
    config = HRAConfig(**({"r": 2, "target_modules": ["0"], "init_weights": False} | fields))
    return transform(nn.Sequential(nn.Linear(d, 4, dtype=F64)), config)


def weight_of(layer: Any) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer._parameters["in_proj_weight"].detach().double()  # type: ignore[union-attr]
    weight = layer._parameters["weight"].detach().double()
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def q_of(layer: Any, *, apply_GS: bool = False) -> Tensor:
    anchor = layer.hra_u.anchor("default")
    vectors = layer.hra_u["default"].detach()
    return dense_q(vectors, apply_GS=apply_GS, anchor=None if anchor is None else anchor.double())


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    r=st.integers(1, 9),
    apply_GS=st.booleans(),
    init_weights=st.booleans(),
    scale=st.sampled_from([1e-3, 0.3, 10.0]),
)
def test_a_row_has_the_values_of_the_dense_product(
    kind: str, r: int, apply_GS: bool, init_weights: bool, scale: float
) -> None:
    model = adapt(kind, F64, scale=scale, r=r, apply_GS=apply_GS, init_weights=init_weights)
    (row,) = report(model)
    q = q_of(model.layer, apply_GS=apply_GS)
    angles = oracle_angles(q)
    assert row.rotation == pytest.approx(float((q - torch.eye(row.d, dtype=F64)).norm()), rel=1e-9, abs=1e-10)
    assert row.angles == pytest.approx(angles, abs=1e-6)
    assert row.angle == pytest.approx(max(angles), rel=1e-6, abs=1e-7)
    assert row.mean_angle == pytest.approx(sum(angles) / len(angles), abs=1e-6)
    assert 0 <= row.orthogonality < 1e-11
    assert (row.d, row.r, row.parameters) == (q.shape[0], r, q.shape[0] * r)
    if scale > 0.01:
        assert row.share == pytest.approx(oracle_share(weight_of(model.layer), q), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_share_of_a_weight_in_lower_precision(kind: str, dtype: torch.dtype) -> None:
    model = adapt(kind, dtype, scale=0.2, r=3)
    (row,) = report(model)
    assert row.share == pytest.approx(oracle_share(weight_of(model.layer), q_of(model.layer)), rel=1e-4)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("apply_GS", [False, True])
def test_a_new_adapter_rotates_nothing(apply_GS: bool, dtype: torch.dtype) -> None:
    for r in (1, 2, 6):
        (row,) = report(adapt("conv", dtype, scale=0.0, r=r, apply_GS=apply_GS))
        assert max(row.rotation, row.angle, row.orthogonality) < (1e-12 if dtype == F64 else 1e-5)
        assert (row.angles, row.mean_angle, row.share) == ((), 0.0, 0.0)


def test_the_report_changes_nothing_and_draws_no_random_numbers() -> None:
    model = adapt("conv", F64, scale=0.1, r=3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert report(model) == report(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_zero_vectors_nan_and_missing_data() -> None:
    for r in (1, 3):
        model = one_linear(r=r)
        with torch.no_grad():
            model[0].hra_u["default"].zero_()
        (row,) = report(model)
        assert (row.rotation, row.angle, row.orthogonality) == (0.0, 0.0, 0.0)
        with torch.no_grad():
            model[0].hra_u["default"][0, 0] = float("nan")
        (row,) = report(model)
        assert all(math.isnan(value) for value in (row.rotation, row.angle, row.orthogonality, row.share))
        assert "nan" in str(report(model))
    (row,) = report(one_linear().to("meta"))
    assert math.isnan(row.share)
    assert math.isnan(row.angle)
    assert (row.d, row.r) == (6, 2)


def test_a_dense_product_would_not_fit_into_memory() -> None:
    """`Q` of 200,000 x 200,000 takes 320 GB."""
    (row,) = report(one_linear(200_000, r=3))
    assert len(row.angles) == 2
    assert 0 < row.share < 1e-3


def test_scaled_merged_and_disabled_adapters() -> None:
    """Scaling scales every angle. Merging and disabling an adapter do not change its row."""
    model = adapt("linear", F64, scale=0.1, r=4)
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


def test_capture_names_the_graph_that_shows_each_layer() -> None:
    model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
    (plain,) = report(model)
    assert (plain.graph, plain.graph_reason) == (None, "")
    program = torch.export.export(nn.Sequential(nn.Linear(6, 8)), (torch.ones(1, 6),))
    captured = report(transform(program, HRAConfig(r=2, target_modules=["0"])), capture=True)
    assert [(row.graph, row.graph_reason) for row in captured] == [("", "")]
    assert " whole model " in str(captured)
    (traced,) = report(model, capture=True)
    assert traced.graph in (None, "")


# ---- angles, and the share and the change of a weight ----


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
