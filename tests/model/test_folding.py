"""Values, rounding and memory layout of folded weights; refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from model.many import F64, adapted, config, normal, refuses
from oracles import dense_weight, layer_q, relative_error
from torch import Tensor, nn

from hra_fx import fold
from hra_fx.errors import FoldError

LAYERS: dict[str, Callable[..., tuple[Any, tuple[int, ...]]]] = {
    "linear": lambda dtype: (nn.Linear(40, 24, dtype=dtype), (5, 40)),
    "conv": lambda dtype: (nn.Conv2d(4, 6, 3, padding=1, dtype=dtype), (2, 4, 6, 7)),
    "oblong": lambda dtype: (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), groups=2, dtype=dtype), (2, 4, 8, 9)),
    "channels last": lambda dtype: (
        nn.Conv2d(4, 6, 3, dtype=dtype).to(memory_format=torch.channels_last),
        (2, 4, 6, 7),
    ),
    "depthwise": lambda dtype: (nn.Conv2d(4, 4, 3, groups=4, dilation=2, dtype=dtype), (2, 4, 8, 9)),
    "circular": lambda dtype: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", dtype=dtype), (2, 4, 6, 7)),
}


def adapt(model: Any, *paths: str, **fields: Any) -> Any:
    """`model` itself, with reflections at random vectors."""
    return adapted(model, a=config(*paths, **{"r": 3} | fields))[1]


def oracle_weight(layer: Any) -> Tensor:
    """`W Q` in float64 of an adapted layer."""
    return dense_weight(layer.weight.detach(), layer_q(layer, ["a"]).detach())


def memory(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


@given(
    kind=st.sampled_from(sorted(LAYERS)),
    r=st.integers(1, 8),
    apply_GS=st.booleans(),
    init_weights=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, F64]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_are_the_nearest_to_the_exact_ones_and_in_the_same_memory(
    kind: str, r: int, apply_GS: bool, init_weights: bool, dtype: torch.dtype
) -> None:
    base, shape = LAYERS[kind](dtype)
    assume(not apply_GS or r <= base.weight[0].numel())
    bias, before = base.bias.detach().clone(), memory(base.weight)
    model = adapt(nn.Sequential(base), "0", r=r, apply_GS=apply_GS, init_weights=init_weights)
    if apply_GS:  # whose result does not depend on lengths
        model[0].hra_u["a"].data[:, 0] *= 1e-9
    x = normal(*shape).to(dtype)
    wanted, weight = model(x).detach(), oracle_weight(model[0])
    fold(model)
    assert model[0] is base
    assert memory(base.weight) == before
    assert torch.equal(base.bias, bias)
    if dtype == F64:
        assert relative_error(model(x), wanted) < 1e-9
        assert relative_error(base.weight, weight) < 1e-12
    else:
        assert torch.equal(base.weight, weight.to(dtype))


# ---- refusals ----


@pytest.mark.parametrize(
    ("spoil", "apply_GS", "text"),
    [
        (lambda layer: layer.hra_u["a"][1, 1].fill_(math.nan), False, "not finite"),
        (lambda layer: layer.hra_u["a"][1, 1].fill_(math.nan), True, "not finite|dependent"),
        (lambda layer: layer.weight[0, 0].fill_(math.nan), False, "not finite"),
        (lambda layer: layer.to(torch.float16).weight.fill_(65000.0), False, "too large for torch.float16"),
        (lambda layer: layer.hra_u["a"][:, 2].copy_(layer.hra_u["a"][:, 0]), True, "dependent"),
    ],
)
def test_a_layer_that_cannot_be_folded_is_named_and_no_other_one_is_folded(
    spoil: Callable[[Any], None], apply_GS: bool, text: str
) -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "0", "2", apply_GS=apply_GS)
    with torch.no_grad():
        spoil(model[2])
    with refuses(model, f"^2: .*({text})", FoldError):
        fold(model)
