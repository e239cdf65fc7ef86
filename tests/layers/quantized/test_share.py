"""The share of a quantized weight that turns, against dense projectors in float64 over what the weight stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from layers.quantized.bases import SCHEMES, adapted, config, inputs, quantized, turn, values
from layers.quantized.unreadable import int4, opaque
from oracles import dense_q
from torch import Tensor, nn

import hra_fx


def due(weight: Tensor, q: Tensor) -> float:
    """`|W P|^2 / |W|^2`, with `P` on the eigenvectors of `(Q - I)^T (Q - I)` that turn; all float64."""
    moved = q - torch.eye(len(q), dtype=q.dtype)
    sizes, vectors = torch.linalg.eigh(moved.mT @ moved)
    basis = vectors[:, sizes > 1e-10]
    return float((weight @ basis).square().sum() / weight.square().sum())


def turned(layer: Any, name: str = "default") -> Tensor:
    gram_schmidt = layer.hra_u.specs[name].apply_GS
    return dense_q(layer.hra_u[name].detach(), apply_GS=gram_schmidt, anchor=layer.hra_u.anchor(name))


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_of_the_rounded_weight_and_changes_nothing(scheme: str, apply_GS: bool) -> None:
    """The weights are chosen so that rounding shows: all of a row but one entry is lost in 8 bits, and more in 4."""
    base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    with torch.no_grad():
        for layer in (base[0], base[2]):
            layer.weight.mul_(1e-3)[:, 0] = 1.0
    model = hra_fx.transform(quantized(scheme, base), config(apply_GS=apply_GS))
    assert [row.share for row in hra_fx.report(model)] == [0.0, 0.0]
    turn(model)
    x = inputs()
    before, output = [values(model[0]), values(model[2])], model(x)
    rows = hra_fx.report(model).rows
    for row, layer, weight in zip(rows, (model[0], model[2]), before, strict=True):
        assert row.share == pytest.approx(due(weight, turned(layer)), rel=1e-5)
        assert torch.equal(values(layer), weight)
    assert torch.equal(model(x), output)


def test_after_evaluation_too() -> None:
    """Where a forward without gradients may have changed the layout of the weight."""
    for scheme in ("bnb nf4", "bnb fp4 nested", "bnb int8"):
        model = adapted(scheme)
        before = [row.share for row in hra_fx.report(model)]
        with torch.no_grad():
            model.eval()(inputs())
        assert [row.share for row in hra_fx.report(model)] == before


def test_what_is_read_through_the_layer() -> None:
    base, packed = opaque()
    model = hra_fx.transform(base, config("0"))
    turn(model)
    (row,) = hra_fx.report(model)
    assert row.share == pytest.approx(due(packed.double(), turned(model[0])), rel=1e-5)


def test_what_no_kernel_can_read_is_not_a_number() -> None:
    model = hra_fx.transform(int4(), config("0"))
    turn(model)
    (row,) = hra_fx.report(model)
    assert math.isnan(row.share)
    assert row.angle > 0
