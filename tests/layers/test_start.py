"""Training starts at the base model, for every rank, with and without Gram-Schmidt, and stays orthogonal."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeAlias

import pytest
import torch
from one_layer import F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn

from hra_fx import HRAConfig, transform

Layer: TypeAlias = nn.Linear | nn.Conv2d
#: The last one takes all dimensions of the square layer.
RANKS = [1, 2, 3, 8, 16]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def adapt(base: nn.Module, r: int, *, apply_GS: bool, init_weights: bool = True) -> Any:
    config = HRAConfig(r=r, apply_GS=apply_GS, init_weights=init_weights, target_modules=["0"])
    return transform(nn.Sequential(copy.deepcopy(base)), config)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(F64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", RANKS)
def test_the_start_is_the_base_layer(r: int, apply_GS: bool, dtype: torch.dtype, bound: float) -> None:
    base = nn.Linear(384, 64, dtype=dtype)
    x = normal(1, 8, 384).to(dtype)
    wanted = copy.deepcopy(base).double()(x.double())
    assert relative_error(adapt(base, r, apply_GS=apply_GS)(x), wanted) < bound


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("r", RANKS)
def test_the_start_has_a_gradient(r: int, apply_GS: bool) -> None:
    """An identity that cannot leave itself would be no start."""
    model = adapt(nn.Linear(20, 12, dtype=F64), r, apply_GS=apply_GS)
    model(normal(1, 5, 20)).square().sum().backward()
    assert float(model[0].hra_u["default"].grad.norm()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "r", "apply_GS", "init_weights"),
    [
        (kind, r, apply_GS, (kind == "conv") ^ apply_GS)
        for kind, r, apply_GS in itertools.product(["linear", "conv"], [*RANKS, 33], [False, True])
    ],
)
def test_twenty_steps_keep_the_matrix_orthogonal(kind: str, r: int, apply_GS: bool, init_weights: bool) -> None:
    base: Layer = nn.Linear(36, 36, dtype=F64) if kind == "linear" else nn.Conv2d(4, 36, 3, dtype=F64)
    inputs = normal(1, 30, *((36,) if kind == "linear" else (4, 3, 3)))
    model = adapt(base, r, apply_GS=apply_GS, init_weights=init_weights)
    layer = model[0]
    vectors, frozen = layer.hra_u["default"], layer.hra_u.anchor("default")
    kept = None if frozen is None else frozen.clone()
    target, optimizer = normal(2, 30, 36), torch.optim.SGD([vectors], lr=0.5)
    losses = [step(model, optimizer, inputs, target) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert kept is None or torch.equal(layer.hra_u.anchor("default"), kept)

    eye = torch.eye(36, dtype=F64)
    dense = dense_q(vectors.detach(), apply_GS=apply_GS, anchor=kept)
    # The layer itself, at the weight I without bias, over the rows of I: its output is Q^T.
    with torch.no_grad():
        layer.hra_base.copy_(eye.view_as(layer.hra_base))
        layer.bias.zero_()
        applied = model(eye.view(36, *inputs.shape[1:])).flatten(1).mT
    for q in (dense, applied):
        assert float((q.mT @ q - eye).norm()) < 1e-9
    assert relative_error(applied, dense) < 1e-9
    assert float((dense - eye).norm()) > 1e-3


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x).flatten(1) - target).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
