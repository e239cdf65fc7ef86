"""Comparison with PEFT, where it is right: the same vectors give the same outputs, gradients, weights and start."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeAlias

import peft
import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import F64, normal
from oracles import relative_error
from torch import Tensor, nn

from hra_fx import HRAConfig, fold, transform

Layer: TypeAlias = nn.Linear | nn.Conv2d
quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)

# Kernels, strides and paddings with which PEFT's unmerged convolution is right: square, zeros, no dilation, no groups.
RIGHT_CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 2, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 5, "stride": 3, "padding": 2},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def by_peft(model: nn.Module, **fields: Any) -> Any:
    """A copy of `model` with PEFT's HRA injected into every direct child that has a weight."""
    config = peft.HRAConfig(target_modules=targets(model), **fields)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The symmetric initialization")
        return peft.inject_adapter_in_model(config, copy.deepcopy(model))


def by_us(model: nn.Module, **fields: Any) -> Any:
    return transform(copy.deepcopy(model), HRAConfig(target_modules=targets(model), **fields))


def targets(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_children() if isinstance(child, (nn.Linear, nn.Conv2d))]


def both(base: Layer, r: int, *, apply_GS: bool, seed: int = 0) -> tuple[Any, Any]:
    """PEFT's model and ours over `base`, at the same random vectors in float64."""
    model = nn.Sequential(base)
    fields: dict[str, Any] = {"r": r, "apply_GS": apply_GS, "init_weights": False}
    theirs, ours = by_peft(model, **fields).double(), by_us(model, **fields)
    vectors = normal(seed, *ours[0].hra_u["default"].shape)
    for adapted in (theirs, ours):
        with torch.no_grad():
            adapted[0].hra_u["default"].copy_(vectors)
    for bias in (theirs[0].base_layer.bias, ours[0].bias):
        if bias is not None:
            bias.requires_grad_()
    return theirs, ours


def grads(model: Any, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input, vectors and bias."""
    x = x.clone().requires_grad_()
    output = model(x)
    leaves = [x, model[0].hra_u["default"]]
    bias = getattr(model[0], "base_layer", model[0]).bias
    if bias is not None:
        leaves.append(bias)
    return [output, *torch.autograd.grad(output, leaves, normal(99, *output.shape))]


def agree(theirs: Any, ours: Any, x: Tensor, floor: float = 0.0) -> None:
    """The same outputs, gradients and merged weight."""
    for wanted, got in zip(grads(theirs, x), grads(ours, x), strict=True):
        assert relative_error(got, wanted, floor=floor) < 1e-9
    theirs[0].merge()
    assert relative_error(fold(ours)[0].weight, theirs[0].base_layer.weight, floor=floor) < 1e-11


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 5, 32])
@pytest.mark.parametrize("kind", RIGHT_CONVOLUTIONS, ids=str)
def test_conv2d(kind: dict[str, Any], r: int, apply_GS: bool) -> None:
    base = nn.Conv2d(6, 4, **kind, dtype=F64)
    r = min(r, 3 * kind["kernel_size"] ** 2) if apply_GS else r  # half of the dimensions, for PEFT's recurrence
    agree(*both(base, r, apply_GS=apply_GS), normal(1, 2, 6, 9, 8))


@quick
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 33), st.booleans(), st.booleans(), seeds)
def test_any_linear(d: int, out: int, r: int, apply_GS: bool, bias: bool, seed: int) -> None:
    # The error of PEFT's recurrence grows with the square of the condition number: use far fewer than d vectors.
    r = min(r, (d + 1) // 2) if apply_GS else r
    theirs, ours = both(nn.Linear(d, out, bias=bias, dtype=F64), r, apply_GS=apply_GS, seed=seed)
    agree(theirs, ours, normal(seed, 5, d), floor=1.0)


def some_layers(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, dtype=dtype),
        nn.Flatten(),
        nn.Linear(24, 10, dtype=dtype),
        nn.ReLU(),
        nn.Linear(10, 4, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("r", "apply_GS", "init_weights"),
    [(2, False, True), (8, False, True), (1, False, False), (2, False, False), (3, True, False), (8, True, False)],
)
def test_the_same_seed_draws_pefts_vectors(r: int, apply_GS: bool, init_weights: bool) -> None:
    """An even rank's identity start, and every random start; odd and Gram-Schmidt identity starts are ours alone."""
    model = some_layers(torch.float32)
    torch.manual_seed(7)
    theirs = by_peft(model, r=r, apply_GS=apply_GS, init_weights=init_weights)
    after_theirs = torch.rand(3)
    torch.manual_seed(7)
    ours = by_us(model, r=r, apply_GS=apply_GS, init_weights=init_weights)
    after_ours = torch.rand(3)
    for name in targets(model):
        wanted = theirs.get_submodule(name).hra_u["default"]
        got = ours.get_submodule(name).hra_u["default"]
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert ours.get_submodule(name).hra_u.anchor("default") is None
    assert torch.equal(after_ours, after_theirs)


def test_a_dilated_convolution_is_still_wrong_in_peft() -> None:
    """This fails once PEFT fixes it: its unmerged and its merged convolution differ."""
    base = nn.Conv2d(3, 4, 3, dilation=2, dtype=F64)
    theirs, ours = both(base, 2, apply_GS=False)
    x = normal(1, 2, 3, 9, 9)
    unmerged = theirs(x)
    theirs[0].merge()
    merged = theirs(x)
    assert unmerged.shape != merged.shape
    assert relative_error(ours(x), merged) < 1e-9
