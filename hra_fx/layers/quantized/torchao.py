"""Weights of torchao, which is not imported here: if it is not loaded, no object has its classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.layers.quantized.scheme import QuantScheme

#: The attributes of tensors that quantize inputs; the name depends on the class.
_OF_INPUTS = ("act_quant_kwargs", "activation_quantization")


class TorchAO(QuantScheme):
    """A weight of torchao.

    torchao does not compute the gradient of the input if inputs are quantized, and otherwise keeps a floating-point
    copy of the weight from the forward to the backward. So hra_fx always computes this gradient.
    """

    straight_through = True

    def description(self, layer: Any) -> str:
        """The library and the class."""
        weight = layer._parameters["weight"]
        size = getattr(weight, "target_dtype", None)
        of = f" of {str(size).removeprefix('torch.')}" if size is not None else ""
        return f"torchao, {type(weight).__name__}{of}"

    def why_no_gradient(self, layer: Any) -> str | None:
        """Quantizing the inputs stops the gradient."""
        weight = layer._parameters["weight"]
        rounds = any(getattr(weight, name, None) is not None for name in _OF_INPUTS)
        return "its input is quantized, and torchao does not pass gradients through that" if rounds else None

    def values(self, layer: Any) -> Tensor:
        """Use `dequantize`, or else the layer's outputs for the unit vectors."""
        weight = layer._parameters["weight"]
        if type(weight).dequantize is not Tensor.dequantize:  # the default is for tensors of torch.ao
            values: Tensor = weight.dequantize()
            return values.detach()
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            return F.linear(unit, weight).mT
