"""Linear layers with weights quantized by bitsandbytes or torchao. Neither library is imported here."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The attribute that says whether a layer may change its layout for the CPU.
_FAST = "support_avx512bf16_for_cpu"
_UNPACKED = "bitsandbytes quantizes its weight when it is first moved to a device. Call model.to(device) first"
#: Tensor subclasses that store enough to quantize other values in the same way.
_MADE = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
#: The attributes of tensors that quantize inputs; the name depends on the class.
_OF_INPUTS = ("act_quant_kwargs", "activation_quantization")


class Requantized(NamedTuple):
    """A weight that was quantized again.

    Attributes:
        weight: a parameter that replaces the layer's weight.
        values: the dequantized values, `(out, d)`.
    """

    weight: nn.Parameter
    values: Tensor


class QuantScheme(ABC):
    """A library's quantization scheme: reads the values of a layer, and quantizes other values in the same way.

    Methods with `why` return the reason as text without a full stop, or `None`.

    Attributes:
        cls: the class with the library's own forward.
        straight_through: whether hra_fx computes the gradient of the layer's input, because the library does not.
    """

    straight_through: bool = False

    def __init__(self, cls: type[nn.Module]) -> None:
        """Create the scheme of all layers of a class."""
        self.cls = cls

    @abstractmethod
    def description(self, layer: nn.Module) -> str:
        """The library and the scheme, for messages."""

    def why_not_adapted(self, layer: nn.Module) -> str | None:
        """Return why a layer cannot be adapted."""
        return None

    def why_not_requantized(self, layer: nn.Module) -> str | None:
        """Return why its weight cannot be quantized again."""
        return None

    def why_no_gradient(self, layer: nn.Module) -> str | None:
        """Return why no gradient passes a layer without an adapter."""
        return None

    def called(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the layer is called."""
        return nullcontext()

    @abstractmethod
    def values(self, layer: nn.Module) -> Tensor:
        """The dequantized weight, `(out, d)`, floating point."""

    @abstractmethod
    def requantized(self, layer: nn.Module, rows: Tensor) -> Requantized:
        """Quantize other values `(out, d)` like the weight of a layer. The layer is not changed."""

    def put(self, layer: Any, weight: nn.Parameter) -> None:
        """Set a weight from `requantized` on a layer."""
        layer._parameters["weight"] = weight


class EightBit(QuantScheme):
    """`Linear8bitLt`: int8 with one scale per row. The layer moves its data between weight and state."""

    def description(self, layer: nn.Module) -> str:
        """Library and scheme."""
        return "bitsandbytes, 8 bit"

    def why_not_adapted(self, layer: Any) -> str | None:
        """Floating-point weights are quantized in each forward, from a copy that folding does not change."""
        if layer.state.has_fp16_weights:
            return (
                "it also keeps a floating-point weight (has_fp16_weights=True), which fold would not change. Create "
                "it with has_fp16_weights=False, or leave it out with exclude_modules"
            )
        return None if layer.weight.dtype == torch.int8 else _UNPACKED

    def values(self, layer: Any) -> Tensor:
        """`int8 * scale / 127`, float32."""
        weight = layer.weight
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return _scaled(weight.data, scale)

    def requantized(self, layer: Any, rows: Tensor) -> Requantized:
        """Quantize from float16, as the library does."""
        weight = layer.weight
        # The library only quantizes weights that are moved from the CPU to a device.
        fresh = _class("Int8Params")(rows.to("cpu", torch.float32), requires_grad=False, has_fp16_weights=False)
        made = fresh.to(weight.device)
        return Requantized(made, _scaled(made.data, made.SCB))

    def put(self, layer: Any, weight: nn.Parameter) -> None:
        """Set the weight and reset the state, which would otherwise keep the old weight."""
        layer._parameters["weight"] = weight
        layer.state.reset_grads()


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
        """No gradient after a forward without gradients, if that forward changed the layout."""
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
        return _dequantized(layer.weight)

    def requantized(self, layer: Any, rows: Tensor) -> Requantized:
        """Quantize with the same block size, type and nesting."""
        _unpack(layer)
        weight = layer.weight
        # Without `module`, which would immediately get the new scales.
        fresh = _class("Params4bit")(
            rows.to(weight.quant_state.dtype),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )
        made = fresh.to(weight.device)
        return Requantized(made, _dequantized(made))

    def put(self, layer: Any, weight: Any) -> None:
        """Set the weight and its scales, which the layer stores a second time."""
        weight.module = layer
        layer._parameters["weight"], layer.quant_state = weight, weight.quant_state


def _class(name: str) -> Any:
    """The library's class of such a weight. Unpickling gives a plain parameter with all its attributes instead."""
    return getattr(sys.modules["bitsandbytes.nn"], name)


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    return rows.to(torch.float32) * (scale.to(rows.device, torch.float32) / 127).unsqueeze(1)


def _dequantized(weight: Any) -> Tensor:
    dequantize: Any = sys.modules["bitsandbytes.functional"].dequantize_4bit
    values: Tensor = dequantize(weight.data, weight.quant_state)
    return values


def _unpack(layer: Any) -> None:
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # this makes the library unpack the weight permanently
    if state.absmax.dim() == 2:  # still transposed, and in bfloat16
        state.absmax = state.absmax.mT.reshape(-1).to(torch.float32)


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
        """No gradient if inputs are quantized."""
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


def quant_scheme_of(layer: nn.Module) -> QuantScheme | None:
    """The scheme of a quantized Linear; `None` for other layers, and for libraries that hra_fx does not support."""
    # If a library is not loaded, no object has its classes.
    library: Any = sys.modules.get("bitsandbytes.nn")
    if library is not None and isinstance(layer, library.Linear4bit):
        return FourBit(library.Linear4bit)
    if library is not None and isinstance(layer, library.Linear8bitLt):
        return EightBit(library.Linear8bitLt)
    cls = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", None)
    fits = cls is not None and isinstance(layer, nn.Linear) and isinstance(layer._parameters.get("weight"), cls)
    return TorchAO(nn.Linear) if fits else None


def call_quantized(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Any]) -> Any:
    """Call a quantized layer by `run`, the library's own forward. Its input `x` gets a gradient in any case.

    If the library does not compute it, this is the straight-through estimator. With `y = W x` for the dequantized
    weight, the gradient of `x` is `W^T` times the gradient of `y`. If inputs are also quantized, the backward pass
    ignores their rounding, as in quantization-aware training (Bengio et al., 2013, https://arxiv.org/abs/1308.3432).
    """
    scheme = quant_scheme_of(layer)
    if scheme is None:  # another tool has set another weight
        return run(x)
    made = scheme.straight_through and torch.is_grad_enabled() and x.requires_grad
    with scheme.called(layer):
        output = run(x.detach() if made else x)
    return _StraightThrough.apply(output, x, layer, scheme) if made else output  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: nn.Module, scheme: QuantScheme) -> Tensor:
        ctx.layer, ctx.scheme, ctx.dtype = layer, scheme, x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weight = ctx.scheme.values(ctx.layer).to(grad.dtype)
        return grad, (grad @ weight).to(ctx.dtype), None, None
