"""Mixed batches over quantized layers, against the dense products of each row's adapter."""

from __future__ import annotations

import pytest
import torch
from layers.quantized import bases
from oracles import relative_error

import hra_fx


@pytest.mark.parametrize("scheme", bases.FEW)
def test_rows_have_their_adapters(scheme: str) -> None:
    model = bases.adapted(scheme)
    hra_fx.add_adapter(model, "odd", bases.config("2", r=3))
    bases.turn(model)
    x, names = bases.inputs(4), ["default", "odd", "__base__", "odd"]
    with torch.no_grad(), hra_fx.mixed_batch(model.eval(), names):
        mixed = model(x)
    for row, name in enumerate(names):
        first, _, last = model
        weights = [
            bases.rotated(layer, name) if name in layer.hra_u.specs else bases.values(layer) for layer in (first, last)
        ]
        hidden = torch.tanh(x[row].double() @ weights[0].mT + first.bias.double())
        wanted = hidden @ weights[1].mT + last.bias.double()
        assert relative_error(mixed[row].double(), wanted) < max(3e-2, bases.SCHEMES[scheme].tolerance), name
