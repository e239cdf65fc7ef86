"""Adapted layers compared with the dense oracle: output and all gradients, in all dtypes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from adapting import randomise
from hypothesis import assume, given, settings, strategies as st
from layers.checking import run_dense
from one_layer import BF16, F32, F64, normal
from oracles import relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx import HRAConfig, transform

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def adapted(layer: nn.Module, r: int, *, seed: int = 0, **fields: Any) -> tuple[nn.Module, Any]:
    """A model of one layer in float64, and an adapted copy in the dtype of the layer. All parameters are trained."""
    base = nn.Sequential(copy.deepcopy(layer))
    config = HRAConfig(**({"r": r, "init_weights": False, "target_modules": ["0"]} | fields))
    model = transform(nn.Sequential(copy.deepcopy(layer)), config)
    randomise(model, seed=seed)
    return base.double().requires_grad_(), model.requires_grad_()


def compare(base: nn.Module, model: Any, x: Tensor, bound: float, floor: float = 0.0) -> None:
    """Compare the output and all gradients with those of the dense product in float64."""

    def results(run: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        leaves = {"x": x, "vectors": model[0].hra_u["default"]}
        leaves |= {name: owner.get_parameter(name) for name, _ in base.named_parameters()}
        output = run(x)
        gradients = torch.autograd.grad(output, list(leaves.values()), normal(99, *output.shape, dtype=output.dtype))
        return {"output": output, **dict(zip(leaves, gradients, strict=True))}

    found = results(model, model, x)
    assert found["output"].dtype == x.dtype
    for name, wanted in results(lambda x: run_dense(base, model, x), base, x.double()).items():
        # The gradient of a bfloat16 weight is rounded in any layer.
        factor = 2 if name == "0.weight" and x.dtype == BF16 else 1
        assert relative_error(found[name], wanted, floor=floor if name == "vectors" else 0.0) < factor * bound, name


# Linear

SHAPES = [(5,), (), (1,), (0,), (2, 3), (2, 3, 4), (2, 0, 4), (1, 1, 1, 1)]


@quick
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 33),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(SHAPES),
    seeds,
)
def test_any_linear(
    d: int, out: int, r: int, apply_GS: bool, bias: bool, init_weights: bool, shape: tuple[int, ...], seed: int
) -> None:
    r = min(r, d) if apply_GS else r
    layer = nn.Linear(d, out, bias=bias, dtype=F64)
    base, model = adapted(layer, r, apply_GS=apply_GS, init_weights=init_weights, seed=seed)
    # In one dimension, Q = (-1)^r for any vectors. Their gradient is zero, so errors are relative to `floor`.
    compare(base, model, normal(seed, *shape, d), 1e-9, floor=1.0)


# Convolutions

CONVOLVED: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, int]:
    """A convolution, and its number of spatial dimensions."""
    axes = draw(st.sampled_from(list(CONVOLVED)))

    def each(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(axes))

    groups, stride = draw(st.sampled_from([1, 2, 3])), each(1, 2, 3)
    paddings: list[Any] = ["valid", each(0, 1), each(1, 2), 1]
    layer = CONVOLVED[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        each(1, 2, 3, 4),
        stride=stride,
        dilation=each(1, 2, 3) if axes < 3 else each(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding=draw(st.sampled_from([*paddings, "same"] if set(stride) == {1} else paddings)),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=F64,
    )
    return layer, axes


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(quick, max_examples=150)
@given(convolutions(), st.integers(1, 33), st.booleans(), st.booleans(), st.sampled_from([(2,), (), (1,), (0,)]), seeds)
def test_any_convolution(
    drawn: tuple[Any, int], r: int, apply_GS: bool, init_weights: bool, batch: tuple[int, ...], seed: int
) -> None:
    layer, axes = drawn
    assume(0 not in batch or layer.padding_mode == "zeros")  # torch cannot pad these
    r = min(r, layer.weight[0].numel()) if apply_GS else r
    base, model = adapted(layer, r, apply_GS=apply_GS, init_weights=init_weights, seed=seed)
    compare(base, model, normal(seed, *batch, layer.in_channels, *(10, 11, 12)[:axes]), 1e-9, floor=1.0)


@pytest.mark.parametrize("how", ["eager", "hook", "graph"])
def test_a_convolution_whose_padding_and_stride_change_later(how: str) -> None:
    """As for images that tile: the adapter has the geometry that the layer has when it is called."""
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=F64)
    model = nn.Sequential(conv)
    config = hra_fx.HRAConfig(r=4, target_modules=["0"], init_weights=False)
    model = hra_fx.transform(model, config, trace=how == "graph")
    if how == "hook":
        conv.hra_u.register_forward_hook(lambda *_: None)
    conv.padding_mode, conv.stride, conv.dilation = "circular", (1, 2), (2, 1)
    for one in (model, copy.deepcopy(model)) if how == "hook" else (model, pickle.loads(pickle.dumps(model))):
        x = normal(1, 2, 4, 9, 8)
        assert relative_error(one(x), hra_fx.fold(copy.deepcopy(one))(x)) < 1e-12


# ---- in narrow dtypes ----

#: As wide as the small layers of real models: with few values, the error would depend on the rounding of one.
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "Linear": (partial(nn.Linear, 96, 64), (32, 96)),
    "3x5": (partial(nn.Conv2d, 16, 24, (3, 5)), (2, 16, 9, 11)),
    "reflect": (partial(nn.Conv2d, 16, 24, 3, padding=1, padding_mode="reflect"), (2, 16, 9, 11)),
    "groups": (partial(nn.Conv2d, 16, 24, 3, groups=2), (2, 16, 9, 11)),
}


@pytest.mark.parametrize(
    ("dtype", "bound", "scale"),
    [(F32, 1e-5, 1.0), (BF16, 6e-3, 1.0), (torch.float16, 3e-3, 1e-6), (torch.float16, 3e-3, 1e5)],
    ids=["float32", "bfloat16", "float16, small vectors", "float16, large vectors"],
)
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_narrow_dtypes(name: str, apply_GS: bool, dtype: torch.dtype, bound: float, scale: float) -> None:
    make, shape = LAYERS[name]
    base, model = adapted(make(dtype=dtype), 3, apply_GS=apply_GS)
    vectors = model[0].hra_u["default"]
    assert vectors.dtype == F32
    with torch.no_grad():
        vectors.mul_(scale)
    compare(base, model, normal(1, *shape, dtype=dtype), bound)
