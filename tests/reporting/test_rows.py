"""The values of a report's rows against dense products in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.checking import dense_weights
from moe_models import built
from one_layer import normal
from oracles import dense_q, layer_q
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx import HRAConfig, report, transform
from hra_fx.functional.statistics import relative_change

F64 = torch.float64
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(14, 9),
    "more vectors than inputs": lambda: nn.Linear(5, 9),
    "conv": lambda: nn.Conv2d(3, 8, (3, 2)),
    "conv with groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "gpt-2": lambda: Conv1D(9, 14),
    "attention": lambda: nn.MultiheadAttention(12, 3),
}


def adapt(layer: nn.Module, dtype: torch.dtype = F64, *, scale: float = 0.0, **fields: Any) -> Any:
    """A model with one layer, whose vectors were changed by random values times `scale`."""
    config = HRAConfig(**{"r": 2, "target_modules": ["0"], **fields})
    model: Any = transform(nn.Sequential(layer).to(dtype), config)
    vectors = model[0].hra_u["default"]
    with torch.no_grad():
        vectors.add_(scale * torch.randn(vectors.shape, dtype=F64, generator=torch.Generator().manual_seed(1)))
    return model


def weight_of(layer: Any) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer._parameters["in_proj_weight"].detach().double()  # type: ignore[union-attr]
    weight = layer._parameters["weight"].detach().double()
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def oracle_angles(q: Tensor, floor: float = 1e-7) -> list[float]:
    """One angle for each plane and for a reflected direction that is left over, from all eigenvalues of `Q`."""
    phases = torch.linalg.eigvals(q).angle()
    # A plane that is rotated by less than pi has one eigenvalue above the real axis.
    inner = [float(phase) for phase in phases if floor < float(phase) < math.pi - floor]
    reflected = int((phases.abs() >= math.pi - floor).sum())
    return sorted([math.pi] * math.ceil(reflected / 2) + inner, reverse=True)


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
    if kind == "more vectors than inputs":
        r, apply_GS = r + 4, False
    model = adapt(LAYERS[kind](), F64, scale=scale, r=r, apply_GS=apply_GS, init_weights=init_weights)
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    (row,) = report(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    q, weight = layer_q(model[0]).detach(), weight_of(model[0])
    angles = oracle_angles(q)
    assert row.angle == pytest.approx(max(angles), rel=1e-6, abs=1e-7)
    assert row.mean_angle == pytest.approx(sum(angles) / len(angles), abs=1e-6)
    assert 0 <= row.orthogonality < 1e-11
    assert (row.d, row.r, row.parameters) == (q.shape[0], r, q.shape[0] * r)
    if scale > 0.01:
        assert row.weight_change == pytest.approx(float((weight @ q - weight).norm() / weight.norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_rotates_nothing(dtype: torch.dtype) -> None:
    """Rounding is not an angle."""
    for r in (2, 16):
        (row,) = report(adapt(LAYERS["conv"](), dtype, scale=0.0, r=r))
        assert row.orthogonality is not None and row.orthogonality < (1e-12 if dtype == F64 else 1e-5)
        assert (row.angle, row.mean_angle) == (0.0, 0.0)
        assert row.weight_change is not None and row.weight_change < (1e-12 if dtype == F64 else 1e-5)


def test_zero_vectors_nan_and_missing_data() -> None:
    for r in (1, 3):
        model = adapt(nn.Linear(6, 4), r=r, init_weights=False)
        with torch.no_grad():
            model[0].hra_u["default"].zero_()
        (row,) = report(model)
        assert (row.weight_change, row.angle, row.orthogonality) == (0.0, 0.0, 0.0)
        with torch.no_grad():
            model[0].hra_u["default"][0, 0] = float("nan")
        (row,) = report(model)
        assert all(map(math.isnan, (row.mean_angle, row.angle, row.orthogonality, row.weight_change)))
        assert "unknown" in str(report(model))
    (row,) = report(adapt(nn.Linear(6, 4)).to("meta"))
    assert (row.weight_change, row.angle, row.d, row.r) == (None, None, 6, 2)


def test_a_dense_product_would_not_fit_into_memory() -> None:
    """`Q` of 200,000 x 200,000 takes 320 GB."""
    (row,) = report(adapt(nn.Linear(200_000, 4), r=3, init_weights=False))
    assert row.angle == math.pi
    assert 0 < row.weight_change < 0.1


def test_scaled_merged_and_disabled_adapters() -> None:
    """Scaling scales every angle. Merging and disabling an adapter do not change its row."""
    model = adapt(LAYERS["linear"](), F64, scale=0.1, r=4)
    (whole,) = report(model).rows
    hra_fx.merge_adapter(model)
    assert report(model).rows == (whole,)
    hra_fx.unmerge_adapter(model)
    with hra_fx.disable_adapters(model):
        assert report(model).rows == (whole,)
    for scale in (1.0, 0.5, 0.0):
        hra_fx.set_scale(model, "default", scale)
        (row,) = report(model).rows
        lines = str(report(model)).splitlines()
        assert (row.scale, "scale" in lines[2], f" {scale:g} " in lines[4]) == (scale, scale != 1, scale != 1)
        assert (row.angle, row.mean_angle) == pytest.approx((whole.angle * scale, whole.mean_angle * scale))


def test_a_weight_that_is_cast_in_pieces_and_weights_of_zeros_and_nan() -> None:
    weight, chain = normal(1, 3000, 2000).float(), normal(2, 2000, 3)
    change = (weight.double() @ dense_q(chain) - weight.double()).norm() / weight.double().norm()
    assert relative_change(weight, chain) == pytest.approx(float(change), rel=1e-5)
    assert relative_change(torch.zeros(3, 2000), chain) == 0.0
    assert math.isnan(relative_change(torch.full((3, 2000), math.nan), chain))


def test_the_change_of_experts_is_relative_to_all_of_them() -> None:
    base = built("mixtral")
    path = "model.layers.1.mlp.experts.gate_up_proj"
    with torch.no_grad():
        base.get_parameter(path).mul_(torch.arange(1, 5)[:, None, None])
    config = HRAConfig(r=2, target_parameters=["experts.gate_up_proj"], init_weights=False)
    model = transform(copy.deepcopy(base), config)
    weight, wanted = base.get_parameter(path).detach(), dense_weights(base, model)[path].detach()
    (row,) = [row for row in report(model) if "layers.1" in row.path]
    assert row.weight_change == pytest.approx(float((wanted - weight).norm() / weight.norm()), rel=1e-5)
    angles = [oracle_angles(dense_q(one)) for one in model.get_submodule(row.path).hra_u["default"].detach()]
    assert row.angle == pytest.approx(max(map(max, angles)), rel=1e-6)
    assert (row.layer_type, row.d, row.r, row.parameters) == (
        "MixtralExperts.gate_up_proj 4x(16->64)",
        16,
        2,
        4 * 16 * 2,
    )
