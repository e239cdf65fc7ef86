"""The libraries whose linear layers are known, by the packages of their classes, and the quirks of each."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.quantized.linear_map import LinearMap, UnknownLinear, tensors_of


class BitsAndBytes(LinearMap):
    """`Linear8bitLt` (int8 with one scale per row) and `Linear4bit` (nf4 or fp4 in blocks).

    On CPUs with AVX512-BF16, a call of `Linear4bit` without gradients changes its layout. It then passes no gradients,
    and changing it back reorders the scales. `AdaptedQuantizedLinear` prevents this.
    """

    def why_not_adapted(self, layer: Any) -> str | None:
        """The weight must be quantized, in the layout that passes gradients."""
        state = getattr(layer.weight, "quant_state", None)
        if state is None and layer.weight.dtype != torch.int8:
            return "bitsandbytes has not quantized its weight. Call model.to(device) first, with has_fp16_weights=False"
        if state is not None and state.absmax.dim() == 2:
            return "a call in eval mode has changed the layout of its weight. Load the model again, and adapt it first"
        return None

    def values(self, layer: Any) -> Tensor:
        """Use the library's functions: outputs are rounded to the dtype in which the layer computes."""
        weight, functional = layer.weight, sys.modules["bitsandbytes.functional"]
        if weight.dtype != torch.int8:
            values: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            values = functional.int8_vectorwise_dequant(
                weight.data, weight.SCB if weight.SCB is not None else layer.state.SCB
            )
        return values


class HQQ(LinearMap):
    """`HQQLinear`. Its own backward fails under autocast, and only its default backend has one."""

    straight_through = True

    def values(self, layer: Any) -> Tensor:
        """Each backward needs the values, so they must be fast."""
        values: Tensor = layer.dequantize()
        return values.detach()


class TorchAO(LinearMap):
    """An `nn.Linear` with a weight of torchao.

    torchao passes no gradients if it quantizes inputs, and otherwise keeps a floating-point copy of the weight for the
    backward.
    """

    straight_through = True

    def description(self, layer: nn.Module) -> str:
        """The class of the weight."""
        return f"torchao, {type(layer._parameters['weight']).__name__}"

    def values(self, layer: Any) -> Tensor:
        """Some weights for GPUs cannot be dequantized: they inherit the function for tensors of torch.ao."""
        weight: Tensor = layer._parameters["weight"].detach()
        return super().values(layer) if type(weight).dequantize is Tensor.dequantize else weight.dequantize()


def quant_scheme_of(layer: nn.Module) -> LinearMap | None:
    """What is known about a linear layer of another library; `None` for a plain weight and for other modules."""
    if isinstance(layer, nn.Linear):
        if _is_of("bitsandbytes", layer):
            return BitsAndBytes()
        is_plain = original_class(layer).forward is nn.Linear.forward
        return TorchAO() if is_plain and _is_of("torchao", layer._parameters.get("weight")) else None
    if not is_foreign_linear(layer):
        return None
    return HQQ() if _is_of("hqq", layer) else LinearMap() if _is_of("gptqmodel", layer) else UnknownLinear()


def is_foreign_linear(layer: nn.Module) -> bool:
    """Whether a module looks like a linear layer: it has `in_features`, `out_features`, tensors and no children."""
    sizes = vars(layer).get("in_features"), vars(layer).get("out_features")
    if isinstance(layer, nn.Linear) or not all(type(size) is int for size in sizes):
        return False
    inside = set(layer._modules) - {"hra_u", "hra_saved"}  # constants of `target.py`, which imports this file
    return not inside and bool(tensors_of(layer))


def packed_name(layer: nn.Module) -> str:
    """The name of the packed weight of a layer of another library: its largest parameter or buffer."""
    return next(iter(tensors_of(layer)))


def _is_of(package: str, found: object) -> bool:
    """Whether an object has a class of a package, or a class that is derived from one."""
    return any(cls.__module__.partition(".")[0] == package for cls in type(found).__mro__)
