"""Quantized models, one for each scheme that runs on a CPU, and the dequantized values of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import bitsandbytes
import torch
import torch.nn.functional as F
from adapting import randomise
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from oracles import layer_q, relative_error
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup, PerTensor
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
from torchao.utils import TorchAOBaseTensor

import hra_fx

WIDTH = 64


class Scheme(NamedTuple):
    """How to quantize a model of Linears.

    Attributes:
        quantize: makes the quantized model of a plain one.
        words: how errors describe it.
        tolerance: of outputs compared with the dequantized weight, relative; larger if inputs are quantized too.
    """

    quantize: Callable[[nn.Sequential], nn.Sequential]
    words: str
    tolerance: float = 1e-5


def _bitsandbytes(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Sequential], nn.Sequential]:
    def quantize(model: nn.Sequential) -> nn.Sequential:
        layers = []
        for layer in model:
            if isinstance(layer, nn.Linear):
                packed = make(layer)
                packed.load_state_dict(layer.state_dict())
                layer = packed
            layers.append(layer)
        return nn.Sequential(*layers).to("cpu")

    return quantize


def _eight(layer: nn.Linear) -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )


def _four(kind: str, *, nested: bool = False) -> Callable[[nn.Linear], nn.Module]:
    return lambda layer: bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=kind,
    )


def torchao(config: Any) -> Callable[[nn.Sequential], nn.Sequential]:
    def quantize(model: nn.Sequential) -> nn.Sequential:
        quantize_(model, config)
        return model

    return quantize


def _each(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Sequential], nn.Sequential]:
    def quantize(model: nn.Sequential) -> nn.Sequential:
        with torch.no_grad():  # HQQ keeps the graph of the bias, which cannot be copied
            return nn.Sequential(*(make(part) if isinstance(part, nn.Linear) else part for part in model))

    return quantize


def hqq(**settings: Any) -> Callable[[nn.Sequential], nn.Sequential]:
    made = BaseQuantizeConfig(**settings)
    return _each(lambda layer: HQQLinear(layer, made, compute_dtype=torch.float32, device="cpu"))


class Packed(nn.Module):
    """Like a layer of a library with its own kernel: it has no `weight` and passes no gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(x, (self.codes * self.scales).to(x.dtype), self.bias.to(x.dtype))


def _int8_error() -> float:
    """The error of products of int8 inputs and weights. Without VNNI instructions, sums overflow in oneDNN."""
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, 128), torch.randn(16, WIDTH)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        return relative_error(layer(x), x @ layer.weight.dequantize().mT + layer.bias)


_INT8 = "torchao, Int8Tensor"
_INTX = "torchao, IntxUnpackedToInt8Tensor of int4"
SCHEMES = {
    "bnb int8": Scheme(_bitsandbytes(_eight), "bitsandbytes, 8 bit"),
    "bnb nf4": Scheme(_bitsandbytes(_four("nf4")), "bitsandbytes, 4 bit nf4"),
    "bnb fp4 nested": Scheme(_bitsandbytes(_four("fp4", nested=True)), "bitsandbytes, 4 bit fp4"),
    "ao int8": Scheme(torchao(Int8WeightOnlyConfig()), _INT8),
    "ao int8 in groups": Scheme(torchao(Int8WeightOnlyConfig(granularity=PerGroup(32))), _INT8),
    "ao int8 of one scale": Scheme(torchao(Int8WeightOnlyConfig(granularity=PerTensor())), _INT8),
    "ao int8 dynamic": Scheme(
        torchao(Int8DynamicActivationInt8WeightConfig()), _INT8, tolerance=max(3e-2, 3 * _int8_error())
    ),
    "ao int4": Scheme(torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))), _INTX),
    "ao int4 asymmetric": Scheme(
        torchao(
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC)
        ),
        _INTX,
    ),
    "ao int4 dynamic": Scheme(
        torchao(Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))),
        _INTX,
        tolerance=3e-2,
    ),
    "hqq 4 bit": Scheme(hqq(nbits=4, group_size=32), "HQQ, 4 bit"),
    "hqq 8 bit by row": Scheme(hqq(nbits=8, group_size=None), "HQQ, 8 bit"),
    "hqq 3 bit by column": Scheme(hqq(nbits=3, group_size=32, axis=0), "HQQ, 3 bit"),
    "unknown": Scheme(_each(Packed), "layers, Packed"),
    "ao float8": Scheme(torchao(Float8WeightOnlyConfig()), "torchao, Float8Tensor"),
}
#: One for each library and each way to compute gradients, for tests that do not depend on numbers.
FEW = ("bnb int8", "bnb nf4", "ao int8", "ao int8 dynamic", "ao int4", "hqq 4 bit", "unknown")


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.Tanh(), nn.Linear(128, 32))


def quantized(scheme: str, base: nn.Sequential | None = None) -> nn.Sequential:
    return SCHEMES[scheme].quantize(plain() if base is None else base)


def config(*targets: str, **fields: object) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 4, "target_modules": list(targets or ("0", "2"))} | fields))


def adapted(scheme: str, **fields: object) -> nn.Sequential:
    """A quantized model with an adapter with random vectors."""
    model = hra_fx.transform(quantized(scheme), config(**fields))
    randomise(model)
    return model


def packed(layer: Any) -> Tensor:
    """The tensor that stands for the weight."""
    name = "W_q" if isinstance(layer, HQQLinear) else "codes" if isinstance(layer, Packed) else "weight"
    return getattr(layer, name) if name == "codes" else layer._parameters[name]


def values(layer: Any) -> Tensor:
    """The dequantized weight of a layer in float64, by the formulas of the libraries, without hra_fx."""
    if isinstance(layer, HQQLinear):
        return layer.dequantize().double()
    if isinstance(layer, Packed):
        return layer.codes.double() * layer.scales.double()
    weight = packed(layer)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scale).double()
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        layer.state_dict()  # restores the layout if a forward has changed it
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    return weight.dequantize().detach().double()


def rotated(layer: Any, *names: str) -> Tensor:
    """`W Q_a Q_b ...` by dense products in float64; differentiable in the vectors."""
    return values(layer) @ layer_q(layer, names or ("default",))


def dense(model: nn.Sequential, x: Tensor, *names: str) -> Tensor:
    """The output of the adapted model of `plain`, by dense products."""
    first, _, last = model
    hidden = torch.tanh(x.double() @ rotated(first, *names).mT + first.bias.double())
    return hidden @ rotated(last, *names).mT + last.bias.double()


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(7))


# ---- weights of torchao that a CPU can create but not dequantize ----


def int4() -> nn.Sequential:
    """A layer as `Int4WeightOnlyConfig` creates it on a GPU. A CPU has no kernel to create or to call it."""
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    scale, zero = torch.ones(2, 32, dtype=torch.bfloat16), torch.zeros(2, 32, dtype=torch.bfloat16)
    packed = torch.zeros(32, 32, dtype=torch.int8)
    weight = Int4Tensor(packed, scale, zero, [1, 32], torch.Size([32, 64]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


class Opaque(TorchAOBaseTensor):
    """A weight that supports only products, like those of GPU kernels. It cannot be dequantized."""

    tensor_data_names: ClassVar = ["packed"]
    tensor_attribute_names: ClassVar[list[str]] = []

    def __new__(cls, packed: Tensor) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed


@Opaque.implements(torch.ops.aten.linear.default)
@Opaque.implements_torch_function(F.linear)
def _(func: object, types: object, args: tuple[Tensor, ...], kwargs: object) -> Tensor:
    x, weight, *bias = args
    with torch.no_grad():
        return F.linear(x, weight.packed.float(), *bias)


def opaque() -> tuple[nn.Sequential, Tensor]:
    """A layer with such a weight, and the values of the weight, `(32, 64)`."""
    layer = nn.Linear(64, 32)
    packed = torch.randint(-8, 8, (32, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    layer.weight = nn.Parameter(Opaque(packed), requires_grad=False)
    return nn.Sequential(layer), packed
