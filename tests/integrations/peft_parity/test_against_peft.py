"""Comparison with PEFT, where it is right: the same vectors give the same outputs, gradients, weights and start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import F64, normal
from oracles import relative_error
from peft_sides import agree, by_peft, by_us, randomise, trained
from torch import Tensor, nn

from hra_fx import fold

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


def both(model: nn.Sequential, **fields: Any) -> tuple[Any, Any]:
    """PEFT's model and ours over copies of `model`, with the layers that have a weight as targets."""
    fields["target_modules"] = [name for name, child in model.named_children() if hasattr(child, "weight")]
    return by_peft(model, **fields), by_us(model, **fields)


def check(base: nn.Module, x: Tensor, seed: int = 0, **fields: Any) -> None:
    """The same output, gradients and merged weight, at the same random vectors in float64."""
    theirs, ours = both(nn.Sequential(base), init_weights=False, **fields)
    for model in (theirs.double(), ours):
        randomise(model, seed)
    agree(theirs, ours, x, F64)
    theirs.merge_adapter()
    merged = theirs.base_model.model[0].base_layer.weight
    assert relative_error(fold(ours)[0].weight, merged, floor=1.0) < 1e-11


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", [1, 5, 32])
@pytest.mark.parametrize("kind", RIGHT_CONVOLUTIONS, ids=str)
def test_conv2d(kind: dict[str, Any], r: int, apply_GS: bool) -> None:
    base = nn.Conv2d(6, 4, **kind, dtype=F64)
    r = min(r, 3 * kind["kernel_size"] ** 2) if apply_GS else r  # half of the dimensions, for PEFT's recurrence
    check(base, normal(1, 2, 6, 9, 8), r=r, apply_GS=apply_GS)


@quick
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 33), st.booleans(), st.booleans(), seeds)
def test_any_linear(d: int, out: int, r: int, apply_GS: bool, bias: bool, seed: int) -> None:
    # The error of PEFT's recurrence grows with the square of the condition number: use far fewer than d vectors.
    r = min(r, (d + 1) // 2) if apply_GS else r
    check(nn.Linear(d, out, bias=bias, dtype=F64), normal(seed, 5, d), seed, r=r, apply_GS=apply_GS)


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
    fields: dict[str, Any] = {"r": r, "apply_GS": apply_GS, "init_weights": init_weights}
    drawn = []
    for make in (by_peft, by_us):
        model = some_layers(torch.float32)
        torch.manual_seed(7)
        vectors = trained(make(model, target_modules=["0", "2", "4"], **fields))
        drawn.append((vectors, torch.rand(3)))
    (wanted, after_theirs), (got, after_ours) = drawn
    assert got.keys() == wanted.keys()
    assert all(got[name].dtype == u.dtype and torch.equal(got[name], u) for name, u in wanted.items())
    assert torch.equal(after_ours, after_theirs)
