"""Layers that carry reflections against the dense oracle: output and every gradient, for each kind of layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import CONVOLUTIONS, F32, F64, Layer, adapted, check, normal
from oracles import dense_q, dense_weight, relative_error
from torch import nn

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Linear


def test_gram_schmidt_of_full_rank_is_minus_the_identity() -> None:
    base = nn.Linear(6, 3, bias=False, dtype=F64)
    model, x = adapted(base, 6, apply_GS=True), normal(1, 4, 6)
    assert relative_error(model(x), -base(x)) < 1e-12
    check(base, model, x, apply_GS=True, bound=1e-9, floor=1.0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 3, 4), (2, 0, 4), (1, 1, 1, 1), "strided"])
def test_linear_on_an_input_of_every_shape(shape: tuple[int, ...] | str) -> None:
    base = nn.Linear(7, 12, dtype=F64)
    x = normal(1, 7, 6).mT if isinstance(shape, str) else normal(1, *shape, 7)
    check(base, adapted(base, 3), x, apply_GS=False, bound=1e-9)


@quick
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 33), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_any_linear(d: int, out: int, r: int, apply_GS: bool, bias: bool, init_weights: bool, seed: int) -> None:
    r = min(r, d) if apply_GS else r
    base = nn.Linear(d, out, bias=bias, dtype=F64)
    model = adapted(base, r, apply_GS=apply_GS, init_weights=init_weights, seed=seed)
    assert (model[0].hra_u.anchor("default") is not None) == (init_weights and (r % 2 == 1 or apply_GS))
    # In one dimension Q = (-1)^r, whatever the vectors: their gradient is zero, hence the floor.
    check(base, model, normal(seed, 5, d), apply_GS=apply_GS, bound=1e-9, floor=1.0)


# Conv2d


def convolution(name: str, dtype: torch.dtype = F64) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "dtype": dtype, **CONVOLUTIONS[name]})


BATCH, ONE, NONE = (2, 4, 9, 11), (4, 9, 11), (0, 4, 9, 11)
#: A batch, one image, and an empty batch, where torch's layer takes it.
INPUTS = [
    *((name, BATCH) for name in CONVOLUTIONS),
    *((name, ONE) for name in CONVOLUTIONS if name != "circular, same, dilation"),
    *((name, NONE) for name in ("3x3", "groups", "1x1", "same")),
]


# torch says so, once, for the base layer too.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize(("name", "shape"), INPUTS)
def test_conv2d_of_every_kind(name: str, shape: tuple[int, ...], apply_GS: bool) -> None:
    base = convolution(name)
    r = min(3, base.weight[0].numel())
    # With as many orthonormal vectors as dimensions Q = -I, and their gradient is zero.
    floor = float(apply_GS and r == base.weight[0].numel())
    model = adapted(base, r, apply_GS=apply_GS)
    check(base, model, normal(1, *shape), apply_GS=apply_GS, bound=1e-9, floor=floor)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_in_channels_last(name: str) -> None:
    base = convolution(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = normal(1, 2, 4, 9, 11).contiguous(memory_format=torch.channels_last)
    model = adapted(base, 3)
    check(base, model, x, apply_GS=False, bound=1e-9)
    assert model(x).stride() == base(x).stride()


CONVOLVED: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, int]:
    """A convolution, and how many axes it has."""
    axes = draw(st.sampled_from(list(CONVOLVED)))

    def each(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(axes))

    groups, stride = draw(st.sampled_from([1, 2, 3])), each(1, 2, 3)
    paddings: list[Any] = ["valid", each(0, 1), each(1, 2), 1]
    layer = CONVOLVED[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        each(1, 2, 3),
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
@settings(quick, max_examples=100)
@given(convolutions(), st.integers(1, 33), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_any_convolution(
    drawn: tuple[Any, int], r: int, apply_GS: bool, init_weights: bool, batched: bool, seed: int
) -> None:
    base, axes = drawn
    r = min(r, base.weight[0].numel()) if apply_GS else r
    model = adapted(base, r, apply_GS=apply_GS, init_weights=init_weights, seed=seed)
    x = normal(seed, *(2,) * batched, base.in_channels, *(9, 7, 8)[:axes])
    check(base, model, x, apply_GS=apply_GS, bound=1e-9, floor=1.0)


# A zero column


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
