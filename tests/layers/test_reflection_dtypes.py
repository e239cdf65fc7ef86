"""Layers that carry reflections in float32, bfloat16, float16 and under autocast, against the float64 oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import (
    BF16,
    CONVOLUTIONS,
    F32,
    Layer,
    adapted,
    check,
    normal,
    run_layer,
    run_oracle,
    upstream_for,
)
from oracles import relative_error
from torch import nn

NARROW = [
    pytest.param(F32, 1e-5, id="float32"),
    pytest.param(BF16, 6e-3, id="bfloat16"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "bound"), NARROW)
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 8, 32])
def test_linear_in_narrow_dtypes(r: int, apply_GS: bool, dtype: torch.dtype, bound: float) -> None:
    base = nn.Linear(96, 64, dtype=dtype)
    model = adapted(base, r, apply_GS=apply_GS)
    assert model[0].hra_u["default"].dtype == F32
    check(base, model, normal(1, 32, 96, dtype=dtype), apply_GS=apply_GS, bound=bound)


@pytest.mark.parametrize(("dtype", "bound"), NARROW)
@pytest.mark.parametrize("name", ["3x3", "3x5", "same", "reflect", "groups", "depthwise", "circular"])
def test_conv2d_in_narrow_dtypes(name: str, dtype: torch.dtype, bound: float) -> None:
    # As wide as the small layers of real models: with a handful of values, the rounding of one or two decides.
    wide = {"in_channels": 16, "out_channels": 24, **CONVOLUTIONS[name]}
    base = nn.Conv2d(**wide, dtype=dtype)
    x = normal(1, 2, base.in_channels, 9, 11, dtype=dtype)
    check(base, adapted(base, 3), x, apply_GS=False, bound=bound)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e5])
@pytest.mark.parametrize("base", [nn.Linear(96, 64), nn.Conv2d(6, 4, 4)], ids=str)
def test_float16_does_not_depend_on_the_scale_of_the_vectors(base: Layer, scale: float) -> None:
    base = copy.deepcopy(base).half()
    model = adapted(base, 4)
    vectors = model[0].hra_u["default"]
    with torch.no_grad():
        vectors.mul_(scale)
    x = normal(1, *((3, 96) if isinstance(base, nn.Linear) else (3, 6, 4, 4)), dtype=torch.float16)
    got, wanted = run_layer(model, x), run_oracle(base, model, x, apply_GS=False)
    for name in ("output", "x", "vectors"):
        assert relative_error(getattr(got, name), getattr(wanted, name)) < 3e-3, name


@pytest.mark.parametrize("base", [nn.Linear(40, 24), nn.Conv2d(40, 24, 1), nn.Conv2d(40, 24, 3)], ids=str)
@pytest.mark.parametrize("apply_GS", [False, True])
def test_under_autocast(base: Layer, apply_GS: bool) -> None:
    model = adapted(base, 4, apply_GS=apply_GS)
    x = normal(1, *((6, 40) if isinstance(base, nn.Linear) else (6, 40, 3, 3)), dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        output = model(x)
    assert output.dtype == BF16
    wanted = run_oracle(base, model, x, apply_GS=apply_GS)
    assert relative_error(output, wanted.output) < 1e-2
    output.backward(upstream_for(output))
    gradient = model[0].hra_u["default"].grad
    assert gradient.dtype == F32
    assert relative_error(gradient, wanted.vectors) < 3e-2
