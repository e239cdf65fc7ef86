"""The report's numbers against those of the dense matrix, and its two forms: rows and a table."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from oracles import dense_q
from torch import Tensor, nn

from hra_fx import HRAConfig, fold, report, transform
from hra_fx.errors import AdapterError
from hra_fx.reporting.row import Row

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def net(dtype: torch.dtype = F64) -> Any:
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 1), groups=2, dtype=dtype), nn.ReLU(), nn.Flatten(), nn.Linear(18, 24, dtype=dtype)
    )


def adapt(model: Any, *, scale: float, **fields: Any) -> Any:
    """`model` with reflections whose vectors were moved off their start by `scale`."""
    model = transform(model, HRAConfig(target_modules=["0", "3"], **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in name:
                parameter.add_(scale * normal(len(name), *parameter.shape, dtype=parameter.dtype))
    return model


def alone(d: int, *, dtype: torch.dtype = F64, **fields: Any) -> Any:
    """A model of one Linear over `d` inputs, adapted."""
    return transform(nn.Sequential(nn.Linear(d, 5, dtype=dtype)), HRAConfig(target_modules=["0"], **fields))


def oracle_numbers(layer: Any, apply_GS: bool) -> tuple[float, float]:
    """`|Q - I|_F` and the largest angle of the eigenvalues of the whole dense `Q`."""
    reflection = layer.hra_u
    q = dense_q(reflection["default"].detach(), apply_GS=apply_GS, anchor=reflection.anchor("default"))
    angles = torch.linalg.eigvals(q).angle().abs()
    return float((q - torch.eye(q.shape[0], dtype=F64)).norm()), float(angles.max())


@pytest.mark.parametrize("scale", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 6])
def test_rotation_angle_and_orthogonality(r: int, apply_GS: bool, init_weights: bool, scale: float) -> None:
    model = adapt(net(), scale=scale, r=r, apply_GS=apply_GS, init_weights=init_weights)
    rows = report(model).rows
    assert [row.path for row in rows] == ["0", "3"]
    for row in rows:
        rotation, angle = oracle_numbers(model.get_submodule(row.path), apply_GS)
        assert row.rotation == pytest.approx(rotation, rel=1e-9, abs=1e-10)
        assert row.angle == pytest.approx(angle, rel=1e-6, abs=1e-7)
        assert 0 <= row.orthogonality < 1e-11


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", range(1, 10))
def test_ranks_up_to_nine(r: int, apply_GS: bool) -> None:
    model = alone(16, r=r, apply_GS=apply_GS)
    vectors = model[0].hra_u["default"]
    with torch.no_grad():
        vectors.add_(0.2 * normal(1, *vectors.shape))
    (row,) = report(model).rows
    rotation, angle = oracle_numbers(model[0], apply_GS)
    assert (row.d, row.r, row.parameters) == (16, r, 16 * r)
    assert row.rotation == pytest.approx(rotation, rel=1e-9)
    assert row.angle == pytest.approx(angle, rel=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 6])
def test_the_start_turns_nothing(r: int, apply_GS: bool, dtype: torch.dtype) -> None:
    bound = 1e-12 if dtype == F64 else 1e-5
    for row in report(transform(net(dtype), HRAConfig(r=r, apply_GS=apply_GS, target_modules=["0", "3"]))):
        assert row.rotation < bound
        assert row.angle < bound
        assert row.orthogonality < bound


@pytest.mark.parametrize("r", [1, 8])
def test_orthogonality_in_float32_is_float32s(r: int) -> None:
    model = alone(64, r=r, init_weights=False, dtype=torch.float32)
    (row,) = report(model).rows
    # Not zero: it is the error of the forward that is shown, not that of a float64 copy of it.
    assert 1e-9 < row.orthogonality < 1e-5


def test_a_single_reflection_by_hand() -> None:
    """|H - I|_F = 2 for every reflection, and it turns its vector round by pi."""
    model = alone(7, r=1, init_weights=False)
    (row,) = report(model).rows
    assert [row.rotation, row.angle] == pytest.approx([2.0, math.pi])


def test_two_reflections_by_hand() -> None:
    """Two vectors at an angle of 0.25 turn their plane by 0.5: |Q - I|_F = sqrt(2) * 2 sin(0.25)."""
    model = alone(7, r=2)
    with torch.no_grad():
        vectors = model[0].hra_u["default"].zero_()
        vectors[0, 0] = 3.0
        vectors[0, 1], vectors[1, 1] = math.cos(0.25), math.sin(0.25)
    (row,) = report(model).rows
    assert [row.angle, row.rotation] == pytest.approx([0.5, math.sqrt(8) * math.sin(0.25)])


def test_the_other_fields() -> None:
    model = adapt(net(), scale=0.1, r=3)
    first, second = report(model).rows
    assert (first.layer_type, first.d, first.r, first.parameters) == ("Conv2d 4->6 3x1, groups 2", 6, 3, 18)
    assert (second.layer_type, second.d, second.r, second.parameters) == ("Linear 18->24", 18, 3, 54)
    assert {first.adapter, second.adapter} == {"default"}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert first.parameters + second.parameters == trained


def test_a_report_changes_nothing_and_draws_nothing() -> None:
    model = adapt(net(), scale=0.1, r=3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert report(model) == report(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("r", [1, 3])
def test_a_zero_column_and_nan_are_shown(r: int) -> None:
    model = adapt(net(), scale=0.1, r=r, init_weights=False)
    with torch.no_grad():
        model[0].hra_u["default"].zero_()
        model[3].hra_u["default"][0, 0] = float("nan")
    first, second = report(model).rows
    assert (first.rotation, first.angle, first.orthogonality) == (0.0, 0.0, 0.0)
    assert all(math.isnan(value) for value in (second.rotation, second.angle, second.orthogonality))
    assert "nan" in str(report(model))


def test_to_dicts_goes_through_json_and_back() -> None:
    found = report(adapt(net(), scale=0.1, r=3))
    rows = found.to_dicts()
    assert json.loads(json.dumps(rows)) == rows
    assert [Row(**(row | {"angles": tuple(row["angles"])})) for row in rows] == list(found)
    assert len(rows) == len(found) == 2


def test_an_anchored_adapter_and_a_fold() -> None:
    model = adapt(net(), scale=0.1, r=3)
    assert len(report(model)) == 2
    with pytest.raises(AdapterError, match="transform"):
        report(fold(model))


class Deep(nn.Module):
    """A layer under a path as long as those of diffusion models and ViTs are."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for name in names:
            child: nn.Module = nn.Linear(384, 1536)
            for part in reversed(name.split(".")):
                holder = nn.Module()
                holder.add_module(part, child)
                child = holder
            self.layers.append(child)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + next(m for m in layer.modules() if isinstance(m, nn.Linear))(x).mean()
        return x


LONG = [
    "query",
    "encoder.layer.11.attention.output.dense",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj",
]


def test_the_table_holds_every_layer_and_its_numbers() -> None:
    model = transform(Deep(*LONG), HRAConfig(r=4, target_modules=r".*(query|dense|to_out\.0|out_proj)"))
    found = report(model)
    text = str(found)
    assert len(found) == len(LONG)
    for row in found:
        assert row.path in text
        assert row.layer_type in text
        assert f"{row.parameters:,}" in text
    assert f"{len(LONG)} adapted layers" in text
    assert repr(found) == text


