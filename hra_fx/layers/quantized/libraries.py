"""Linear layers of quantization libraries, by the packages of their classes. Only what they compute is known."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class

#: Packages with linear layers that are not `nn.Linear`, for GPTQ, AWQ, HQQ and others.
_PACKED = ("aqlm", "awq", "eetq", "gptqmodel", "hqq")


class LinearMap:
    """How to describe, check and dequantize a linear layer of another library."""

    def description(self, layer: nn.Module) -> str:
        """The package and the class, for messages."""
        cls = original_class(layer)
        return f"{cls.__module__.partition('.')[0]}, {cls.__name__}"

    def why_not_adapted(self, layer: Any) -> str | None:
        """Return why a layer cannot be adapted, without a final period."""
        return None

    def values(self, layer: Any) -> Tensor:
        """The dequantized weight `(out, d)`: by the layer's function, or the outputs for the unit vectors."""
        if hasattr(layer, "dequantize"):  # HQQ
            dequantized: Tensor = layer.dequantize().detach()
            return dequantized
        alone: Any = object.__new__(original_class(layer))  # without adapters
        vars(alone).update(vars(layer))
        for held in ("_parameters", "_buffers"):  # a large bias would hide the digits of the rest
            own = vars(layer)[held].items()
            vars(alone)[held] = {n: torch.zeros_like(t) if n == "bias" and t is not None else t for n, t in own}
        tensors = list(tensors_of(layer).values())
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float16)
        with torch.no_grad():
            rows = torch.eye(layer.in_features, dtype=dtype, device=tensors[0].device)
            found: Tensor = original_class(layer).forward(alone, rows)
        return found.mT.clone()  # some kernels return tensors of inference mode


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


class TorchAO(LinearMap):
    """An `nn.Linear` with a weight of torchao."""

    def description(self, layer: nn.Module) -> str:
        """The class of the weight."""
        return f"torchao, {type(layer._parameters['weight']).__name__}"

    def values(self, layer: Any) -> Tensor:
        """Some weights for GPUs cannot be dequantized: they inherit the function for tensors of torch.ao."""
        weight: Tensor = layer._parameters["weight"].detach()
        return super().values(layer) if type(weight).dequantize is Tensor.dequantize else weight.dequantize()


def quant_scheme_of(layer: nn.Module) -> LinearMap | None:
    """What is known about a linear layer of another library; `None` for a plain weight and for other modules."""
    if not isinstance(layer, nn.Linear):
        return LinearMap() if is_packed(layer) else None
    if _is_of(("bitsandbytes",), layer):
        return BitsAndBytes()
    is_plain = original_class(layer).forward is nn.Linear.forward
    return TorchAO() if is_plain and _is_of(("torchao",), layer._parameters.get("weight")) else None


def is_packed(layer: nn.Module) -> bool:
    """Whether a module is a linear layer of another library that is not an `nn.Linear`."""
    sizes = vars(layer).get("in_features"), vars(layer).get("out_features")
    is_linear = not isinstance(layer, nn.Linear) and None not in sizes and _is_of(_PACKED, layer)
    return is_linear and bool(tensors_of(layer))


def packed_name(layer: nn.Module) -> str:
    """The name of the packed weight of a layer of another library: its largest parameter or buffer."""
    return next(iter(tensors_of(layer)))


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters and buffers, the largest first."""
    found = {name: t for held in (layer._parameters, layer._buffers) for name, t in held.items() if t is not None}
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))


def _is_of(packages: tuple[str, ...], found: object) -> bool:
    """Whether an object has a class of a package, or a class that is derived from one."""
    return any(cls.__module__.partition(".")[0] in packages for cls in type(found).__mro__)
