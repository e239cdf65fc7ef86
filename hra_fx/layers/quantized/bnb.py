"""Layers of bitsandbytes, which is not imported here: if it is not loaded, no object has its classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.quantized.scheme import QuantScheme

#: The attribute that says whether a layer may change its layout for the CPU.
_FAST = "support_avx512bf16_for_cpu"
_UNPACKED = "bitsandbytes quantizes its weight when it is first moved to a device. Call model.to(device) first"


class EightBit(QuantScheme):
    """`Linear8bitLt`: int8 with one scale per row. The layer moves its data between weight and state."""

    def description(self, layer: nn.Module) -> str:
        """Library and scheme."""
        return "bitsandbytes, 8 bit"

    def why_not_adapted(self, layer: Any) -> str | None:
        """With `has_fp16_weights`, each forward quantizes the floating-point weight again."""
        if layer.state.has_fp16_weights:
            return "it was created with has_fp16_weights=True. Set that to False, or leave it out with exclude_modules"
        return None if layer.weight.dtype == torch.int8 else _UNPACKED

    def values(self, layer: Any) -> Tensor:
        """`int8 * scale / 127`, float32."""
        weight = layer.weight
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        values: Tensor = weight.data.to(torch.float32) * (scale.to(weight.device, torch.float32) / 127).unsqueeze(1)
        return values


class FourBit(QuantScheme):
    """`Linear4bit`: nf4 or fp4 in blocks, packed into a column of bytes.

    On a CPU with AVX512-BF16, a forward without gradients permanently changes the layout. It then does not pass
    gradients, and the conversion back (0.50) rounds the scales and reorders them. So this change is prevented.
    """

    def description(self, layer: Any) -> str:
        """Library and scheme."""
        return f"bitsandbytes, 4 bit {layer.weight.quant_type}"

    def why_not_adapted(self, layer: Any) -> str | None:
        """A weight that the library has not quantized does not have scales."""
        return None if getattr(layer.weight, "quant_state", None) is not None else _UNPACKED

    def why_no_gradient(self, layer: Any) -> str | None:
        """A forward without gradients may change the layout, and afterwards no gradient passes."""
        if layer.weight.device.type != "cpu" or not getattr(layer, _FAST, False):
            return None
        return "on this CPU, bitsandbytes does not pass gradients after a call without gradients"

    @contextmanager
    def called(self, layer: Any) -> Iterator[None]:
        """Keep the layout of the stored weight."""
        _unpack(layer)
        fast = getattr(layer, _FAST, None)
        if fast:
            setattr(layer, _FAST, False)
        try:
            yield
        finally:
            if fast:
                setattr(layer, _FAST, fast)

    def values(self, layer: Any) -> Tensor:
        """Return values in the dtype that the weight had before quantization."""
        _unpack(layer)
        dequantize: Any = sys.modules["bitsandbytes.functional"].dequantize_4bit
        values: Tensor = dequantize(layer.weight.data, layer.weight.quant_state)
        return values


def _unpack(layer: Any) -> None:
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # this makes the library unpack the weight permanently
    if state.absmax.dim() == 2:  # still transposed, and in bfloat16
        state.absmax = state.absmax.mT.reshape(-1).to(torch.float32)
