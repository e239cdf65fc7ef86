"""Weights of torchao, which is not imported here: if it is not loaded, no object has its classes."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.layers.quantized.scheme import QuantScheme, Requantized

#: Tensor subclasses that store the settings with which they were quantized.
_MADE = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
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

    def why_not_requantized(self, layer: Any) -> str | None:
        """Only some classes record how they were quantized."""
        weight = layer._parameters["weight"]
        name = type(weight).__name__
        if name not in _MADE:
            return f"its {name} does not record how it was quantized"
        if getattr(weight, "act_pre_scale", None) is not None or getattr(weight, "act_quant_scale", None) is not None:
            return f"its {name} has input scales that were calibrated for the current weight"
        return None

    def values(self, layer: Any) -> Tensor:
        """Use `dequantize`, or else the layer's outputs for the unit vectors."""
        weight = layer._parameters["weight"]
        if type(weight).dequantize is not Tensor.dequantize:  # the default is for tensors of torch.ao
            values: Tensor = weight.dequantize()
            return values.detach()
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            return F.linear(unit, weight).mT

    def requantized(self, layer: Any, rows: Tensor) -> Requantized:
        """Quantize with the same block size, symmetry and handling of inputs."""
        old = layer._parameters["weight"].data
        new = (_int8 if type(old).__name__ == "Int8Tensor" else _intx)(old, rows.to(old.dtype))
        return Requantized(nn.Parameter(new, requires_grad=False), new.dequantize())


def _int8(old: Any, rows: Tensor) -> Any:
    granularity: Any = sys.modules["torchao.quantization.granularity"]
    group = old.block_size[-1]
    if list(old.block_size) == list(old.shape):
        size = granularity.PerTensor()
    else:
        size = granularity.PerRow() if group == old.shape[-1] else granularity.PerGroup(group)
    return type(old).from_hp(
        rows,
        size,
        mapping_type=_symmetry(old),
        act_quant_kwargs=old.act_quant_kwargs,
        reduce_range=old.reduce_range,
    )


def _intx(old: Any, rows: Tensor) -> Any:
    new = type(old).from_hp(
        rows,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=_symmetry(old),
        activation_quantization=old.activation_quantization,
    )
    new.scale = new.scale.to(old.scale.dtype)
    return new


def _symmetry(old: Any) -> Any:
    kinds: Any = sys.modules["torchao.quantization.quant_primitives"].MappingType
    shifted = old.zero_point is not None and bool(old.zero_point.any())
    return kinds.ASYMMETRIC if shifted else kinds.SYMMETRIC
