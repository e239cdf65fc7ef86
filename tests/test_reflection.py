"""Layers that carry reflections against the dense oracle: output and every gradient, for each kind of layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn

from hra_fx import HRAConfig, transform
from hra_fx.errors import AdapterError
from hra_fx.reflection import AdapterSpec, Reflection, reflection_for

Layer: TypeAlias = nn.Linear | nn.Conv2d
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapted(base: Layer, r: int, *, apply_GS: bool = False, init_weights: bool = False, seed: int = 0) -> Any:
    """A model of one layer: a copy of `base`, reflections at random vectors, gradients wanted of every parameter."""
    config = HRAConfig(r=r, apply_GS=apply_GS, init_weights=init_weights, target_modules=["0"])
    model = transform(nn.Sequential(copy.deepcopy(base)), config)
    layer: Any = model[0]
    vectors = layer.hra_u["default"]
    with torch.no_grad():
        vectors.copy_(normal(seed, *vectors.shape, dtype=vectors.dtype))
    layer.requires_grad_()
    return model


@dataclass
class Passed:
    """What a forward and a backward give."""

    output: Tensor
    x: Tensor
    vectors: Tensor
    weight: Tensor
    bias: Tensor | None


def upstream_for(output: Tensor) -> Tensor:
    return normal(99, *output.shape, dtype=output.dtype)


def run_layer(model: Any, x: Tensor) -> Passed:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    output.backward(upstream_for(output))
    layer = model[0]
    bias = None if layer.bias is None else layer.bias.grad
    assert x.grad is not None
    return Passed(output, x.grad, layer.hra_u["default"].grad, layer.weight.grad, bias)


def run_oracle(base: Layer, model: Any, x: Tensor, *, apply_GS: bool) -> Passed:
    """`base`'s own arithmetic in float64 at the weight `W Q`."""
    reflection = model[0].hra_u
    x = x.detach().double().requires_grad_()
    vectors = reflection["default"].detach().double().requires_grad_()
    weight = base.weight.detach().double().requires_grad_()
    bias = None if base.bias is None else base.bias.detach().double().requires_grad_()
    prefix = reflection.anchor("default")
    turned = dense_weight(weight, dense_q(vectors, apply_GS=apply_GS, anchor=prefix))
    if isinstance(base, nn.Conv2d):
        output = copy.deepcopy(base).double()._conv_forward(x, turned, bias)
    else:
        output = nn.functional.linear(x, turned, bias)
    output.backward(upstream_for(output))
    grads = [None if leaf is None else leaf.grad for leaf in (x, vectors, weight, bias)]
    assert grads[0] is not None
    assert grads[1] is not None
    assert grads[2] is not None
    return Passed(output, grads[0], grads[1], grads[2], grads[3])


def check(base: Layer, model: Any, x: Tensor, *, apply_GS: bool, bound: float, floor: float = 0.0) -> None:
    got, wanted = run_layer(model, x), run_oracle(base, model, x, apply_GS=apply_GS)
    assert got.output.dtype == x.dtype
    assert relative_error(got.output, wanted.output) < bound
    assert relative_error(got.x, wanted.x) < bound
    assert relative_error(got.vectors, wanted.vectors, floor=floor) < bound
    # A narrow weight's own gradient is rounded as a whole, by any layer: no promise is made for it.
    assert relative_error(got.weight, wanted.weight) < (bound if x.dtype != BF16 else 2 * bound)
    assert (got.bias is None) == (wanted.bias is None)
    if got.bias is not None and wanted.bias is not None:
        assert relative_error(got.bias, wanted.bias) < bound


# Linear


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", range(1, 34))
def test_linear_of_every_rank(r: int, apply_GS: bool) -> None:
    base = nn.Linear(40, 24, dtype=F64)
    check(base, adapted(base, r, apply_GS=apply_GS), normal(1, 6, 40), apply_GS=apply_GS, bound=1e-9)


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 8])
def test_anchored_linear(r: int, apply_GS: bool) -> None:
    base = nn.Linear(20, 30, dtype=F64)
    model = adapted(base, r, apply_GS=apply_GS, init_weights=True)
    assert (model[0].hra_u.anchor("default") is None) == (r % 2 == 0 and not apply_GS)
    check(base, model, normal(1, 6, 20), apply_GS=apply_GS, bound=1e-9)


@pytest.mark.parametrize(("d", "r"), [(1, 1), (1, 4), (2, 33), (5, 8), (8, 9)])
def test_more_reflections_than_dimensions(d: int, r: int) -> None:
    base = nn.Linear(d, 3, dtype=F64)
    # In one dimension Q = (-1)^r, whatever the vectors: their gradient is zero.
    check(base, adapted(base, r), normal(1, 6, d), apply_GS=False, bound=1e-9, floor=float(d == 1))


def test_gram_schmidt_of_full_rank_is_minus_the_identity() -> None:
    base = nn.Linear(6, 3, bias=False, dtype=F64)
    model, x = adapted(base, 6, apply_GS=True), normal(1, 4, 6)
    assert relative_error(model(x), -base(x)) < 1e-12
    check(base, model, x, apply_GS=True, bound=1e-9, floor=1.0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 3, 4), (2, 0, 4), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d", "out"), [(7, 12), (12, 7), (9, 1)])
def test_linear_of_every_shape(shape: tuple[int, ...], bias: bool, d: int, out: int) -> None:
    base = nn.Linear(d, out, bias=bias, dtype=F64)
    check(base, adapted(base, 3), normal(1, *shape, d), apply_GS=False, bound=1e-9)


def test_linear_on_a_strided_input() -> None:
    base = nn.Linear(7, 5, dtype=F64)
    check(base, adapted(base, 3), normal(1, 7, 6).mT, apply_GS=False, bound=1e-9)


@quick
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 33), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_any_linear(d: int, out: int, r: int, apply_GS: bool, bias: bool, init_weights: bool, seed: int) -> None:
    r = min(r, d) if apply_GS else r
    base = nn.Linear(d, out, bias=bias, dtype=F64)
    model = adapted(base, r, apply_GS=apply_GS, init_weights=init_weights, seed=seed)
    check(base, model, normal(seed, 5, d), apply_GS=apply_GS, bound=1e-9, floor=1.0)


# Conv2d

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3},
    "no bias": {"kernel_size": 3, "bias": False},
    "1x3": {"kernel_size": (1, 3)},
    "3x1": {"kernel_size": (3, 1)},
    "3x5": {"kernel_size": (3, 5)},
    "2x4": {"kernel_size": (2, 4)},
    "stride": {"kernel_size": 3, "stride": 2},
    "oblong stride": {"kernel_size": 3, "stride": (2, 1)},
    "stride over the kernel": {"kernel_size": 1, "stride": 3},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "oblong dilation": {"kernel_size": (3, 2), "dilation": (2, 3), "padding": 1},
    "padding": {"kernel_size": 3, "padding": 1},
    "oblong padding": {"kernel_size": 3, "padding": (1, 0)},
    "padding over the kernel": {"kernel_size": 1, "padding": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "same, dilation": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": (3, 5), "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "reflect, same": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
    "circular, same, dilation": {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"},
    "replicate, valid": {"kernel_size": 3, "padding": "valid", "padding_mode": "replicate"},
    "groups": {"kernel_size": 3, "groups": 2},
    "groups of one output": {"kernel_size": 3, "groups": 4, "out_channels": 4},
    "depthwise": {"kernel_size": (3, 5), "groups": 4, "out_channels": 4, "padding": "same"},
    "depthwise, two for each": {"kernel_size": 3, "groups": 4, "out_channels": 8, "stride": 2},
    "groups, reflect": {"kernel_size": (3, 1), "groups": 2, "padding": (1, 0), "padding_mode": "reflect"},
    "everything": {
        "kernel_size": (3, 2),
        "stride": (1, 2),
        "dilation": (2, 1),
        "groups": 2,
        "padding": (2, 3),
        "padding_mode": "circular",
        "bias": False,
    },
}


def convolution(name: str, dtype: torch.dtype = F64) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "dtype": dtype, **CONVOLUTIONS[name]})


# torch says so, once, for the base layer too.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_of_every_kind(name: str, apply_GS: bool) -> None:
    base = convolution(name)
    r = min(3, base.weight[0].numel())
    # With as many orthonormal vectors as dimensions Q = -I, and their gradient is zero.
    floor = float(apply_GS and r == base.weight[0].numel())
    model = adapted(base, r, apply_GS=apply_GS)
    check(base, model, normal(1, 2, 4, 9, 11), apply_GS=apply_GS, bound=1e-9, floor=floor)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_in_channels_last(name: str) -> None:
    base = convolution(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = normal(1, 2, 4, 9, 11).contiguous(memory_format=torch.channels_last)
    model = adapted(base, 3)
    check(base, model, x, apply_GS=False, bound=1e-9)
    assert model(x).stride() == base(x).stride()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name != "circular, same, dilation"])
def test_conv2d_without_a_batch(name: str) -> None:
    base = convolution(name)
    check(base, adapted(base, 3), normal(1, 4, 9, 11), apply_GS=False, bound=1e-9)


@pytest.mark.parametrize("name", ["3x3", "groups", "depthwise", "reflect"])
def test_conv2d_on_a_batch_of_one(name: str) -> None:
    base = convolution(name)
    check(base, adapted(base, 3), normal(1, 1, 4, 9, 11), apply_GS=False, bound=1e-9)


@pytest.mark.parametrize("name", ["3x3", "groups", "1x1", "same"])
def test_conv2d_on_an_empty_batch(name: str) -> None:
    base = convolution(name)
    check(base, adapted(base, 3), torch.empty(0, 4, 9, 11, dtype=F64), apply_GS=False, bound=1e-9)


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", range(1, 34))
def test_conv2d_of_every_rank(r: int, apply_GS: bool) -> None:
    base = nn.Conv2d(4, 5, 3, padding=1, dtype=F64)
    check(base, adapted(base, r, apply_GS=apply_GS), normal(1, 2, 4, 5, 6), apply_GS=apply_GS, bound=1e-9)


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 8])
def test_anchored_conv2d(r: int, apply_GS: bool) -> None:
    base = nn.Conv2d(4, 6, (3, 2), groups=2, padding_mode="reflect", padding=1, dtype=F64)
    model = adapted(base, r, apply_GS=apply_GS, init_weights=True)
    check(base, model, normal(1, 2, 4, 5, 6), apply_GS=apply_GS, bound=1e-9)


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    stride = draw(pair)
    paddings: list[Any] = ["valid", (0, 1), (1, 0), (2, 2), 1]
    return nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        draw(pair),
        stride=stride,
        dilation=draw(pair),
        groups=groups,
        bias=draw(st.booleans()),
        padding=draw(st.sampled_from([*paddings, "same"] if stride == (1, 1) else paddings)),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=F64,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@quick
@given(convolutions(), st.integers(1, 33), st.booleans(), st.booleans(), seeds)
def test_any_conv2d(base: nn.Conv2d, r: int, apply_GS: bool, init_weights: bool, seed: int) -> None:
    r = min(r, base.weight[0].numel()) if apply_GS else r
    model = adapted(base, r, apply_GS=apply_GS, init_weights=init_weights, seed=seed)
    check(base, model, normal(seed, 2, base.in_channels, 8, 9), apply_GS=apply_GS, bound=1e-9, floor=1.0)


# Precision

NARROW = [
    pytest.param(F32, 1e-5, id="float32"),
    pytest.param(BF16, 5e-3, id="bfloat16"),
]


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
    # As wide as the small layers of real models: of a handful of numbers, the rounding of one or two decides.
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


@pytest.mark.parametrize("base", [nn.Linear(6, 4), nn.Conv2d(2, 4, 3)], ids=str)
@pytest.mark.parametrize("r", [1, 2, 5])
def test_a_zero_column_in_a_layer(base: Layer, r: int) -> None:
    model = adapted(base, r)
    vectors = model[0].hra_u["default"]
    with torch.no_grad():
        vectors[:, 0] = 0
    x = normal(1, *((6,) if isinstance(base, nn.Linear) else (2, 5, 5)), dtype=F32)
    q = dense_q(vectors.detach()[:, 1:])
    turned = dense_weight(base.weight.detach(), q)
    wanted = copy.deepcopy(base).double()
    wanted.weight.data = turned
    output = model(x)
    assert relative_error(output, wanted(x.double())) < 1e-5
    output.sum().backward()
    assert bool(torch.isfinite(vectors.grad).all())


# The container


def test_no_active_adapter_is_the_base_layer() -> None:
    for base, shape in ((nn.Linear(6, 4), (3, 6)), (nn.Conv2d(2, 4, 3), (3, 2, 5, 5))):
        model, x = adapted(base, 2), normal(1, *shape, dtype=F32)
        model[0].hra_u.active = ()
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("base", [nn.Linear(6, 4, dtype=F64), nn.Conv2d(2, 4, 3, padding=1, dtype=F64)], ids=str)
def test_two_active_adapters_multiply_in_their_order(base: Layer) -> None:
    model = adapted(base, 2)
    reflection: Reflection = model[0].hra_u
    reflection.add("second", AdapterSpec(r=3, apply_GS=True, init_weights=False), base.weight)
    reflection.active = ("second", "default")
    q = dense_q(reflection["second"].detach(), apply_GS=True) @ dense_q(reflection["default"].detach())
    wanted = copy.deepcopy(base)
    wanted.weight.data = dense_weight(base.weight.detach(), q)
    x = normal(1, *((3, 6) if isinstance(base, nn.Linear) else (3, 2, 5, 5)))
    assert relative_error(model(x), wanted(x)) < 1e-9


@pytest.mark.parametrize("name", ["", "a.b", "x_anchor", "keys", "forward", "default"])
def test_an_adapter_name_that_cannot_be_a_parameters_name(name: str) -> None:
    layer = nn.Linear(6, 4)
    reflection = reflection_for(layer)
    reflection.add("default", AdapterSpec(r=2), layer.weight)
    with pytest.raises(AdapterError, match="adapter name"):
        reflection.add(name, AdapterSpec(r=2), layer.weight)
    assert list(reflection) == ["default"]
    assert reflection.active == ("default",)
