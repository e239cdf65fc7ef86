"""What hra_fx reads of the quantized layers of bitsandbytes and torchao."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from canaries.canary import canary
from layers.quantized.bases import SCHEMES, WIDTH, quantized

from hra_fx.layers.quantized.detect import quant_scheme_of

BREAKS = "adapters in quantized layers, and fold(requantize=True)"


def check(name: str) -> None:
    """The values of a weight, and those of another one that is quantized in the same way, are what the layer uses."""
    layer: Any = quantized(name)[0]
    scheme = quant_scheme_of(layer)
    assert scheme is not None and scheme.description(layer) == SCHEMES[name].words
    assert scheme.why_not_adapted(layer) is None
    values = scheme.values(layer)
    assert torch.allclose(columns(layer), values, atol=SCHEMES[name].tolerance)
    assert (scheme.why_not_requantized(layer) is None) is SCHEMES[name].refolds
    if SCHEMES[name].refolds:
        made = scheme.requantized(layer, values.flip(0))
        assert type(made.weight.data) is type(layer.weight.data)
        assert torch.allclose(made.values, values.flip(0), atol=0.03)
        scheme.put(layer, made.weight)
        assert torch.allclose(columns(layer), made.values, atol=SCHEMES[name].tolerance)


def columns(layer: Any) -> torch.Tensor:
    """The weight that a layer computes with."""
    with torch.no_grad(), quant_scheme_of(layer).called(layer):  # type: ignore[union-attr]
        made: torch.Tensor = layer(torch.eye(WIDTH)) - layer.bias
    return made.mT


@canary(
    "bitsandbytes",
    "`state`, `SCB` and `reset_grads` of 8-bit layers, or `quant_state` and the layout of 4-bit ones",
    reader="hra_fx/layers/quantized/bitsandbytes_layers.py",
    breaks=BREAKS,
)
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("bnb")])
def test_bitsandbytes(name: str) -> None:
    check(name)


@canary(
    "torchao",
    "the class names of its tensors, or how they keep what they were made with",
    reader="hra_fx/layers/quantized/torchao_weights.py",
    breaks=BREAKS,
)
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("ao")])
def test_torchao(name: str) -> None:
    check(name)
    layer = quantized(name)[0]
    blocks_gradients = quant_scheme_of(layer).why_no_gradient(layer) is not None  # type: ignore[union-attr]
    assert blocks_gradients is name.endswith("dynamic"), "where it quantizes inputs too"
