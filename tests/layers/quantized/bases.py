"""Quantized models, one for each library and each way to compute gradients, and the values of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

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
from torchao.quantization.granularity import PerGroup
from torchao.utils import TorchAOBaseTensor

import hra_fx

WIDTH = 64


class Packed(nn.Module):
    """Like a layer of GPTQModel with its own kernel: it has no `weight` and passes no gradient.

    AWQ's kernels for GPUs return inference tensors, which autograd cannot use.
    """

    __module__ = "gptqmodel"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.linear(x, (self.codes * self.scales).to(x.dtype), self.bias.to(x.dtype))


class Opaque(TorchAOBaseTensor):
    """A weight of torchao that only supports products, like those of GPU kernels. It cannot be dequantized."""

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


def _opaque(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(Opaque((layer.weight.detach() * 50).round().to(torch.int8)), requires_grad=False)
    return layer


def _eight(layer: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear8bitLt(*layer.weight.shape[::-1], has_fp16_weights=False, threshold=6.0)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _four(layer: nn.Linear, kind: str = "nf4", *, nested: bool = False) -> nn.Module:
    sizes = layer.weight.shape[::-1]
    made = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, compress_statistics=nested, quant_type=kind)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _hqq(layer: nn.Linear) -> nn.Module:
    """As in HQQ's documentation. Without `torch.no_grad()`, the layer keeps the graph of its bias."""
    return HQQLinear(layer, BaseQuantizeConfig(nbits=4, group_size=32), compute_dtype=torch.float32, device="cpu")


def torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantize(layer: nn.Linear) -> nn.Module:
        quantize_(layer, config)
        return layer

    return quantize


def _int4(config: Any = IntxWeightOnlyConfig, granularity: str = "granularity") -> Callable[[nn.Linear], nn.Module]:
    return torchao(config(weight_dtype=torch.int4, **{granularity: PerGroup(32)}))


#: How to quantize a layer.
SCHEMES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes, Linear8bitLt": _eight,
    "bitsandbytes, Linear4bit": _four,
    "bitsandbytes, Linear4bit: fp4, nested": lambda layer: _four(layer, "fp4", nested=True),
    "torchao, Int8Tensor": torchao(Int8WeightOnlyConfig()),
    "torchao, Int8Tensor: dynamic": torchao(Int8DynamicActivationInt8WeightConfig()),
    "torchao, IntxUnpackedToInt8Tensor": _int4(),
    "torchao, IntxUnpackedToInt8Tensor: dynamic": _int4(Int8DynamicActivationIntxWeightConfig, "weight_granularity"),
    "torchao, Float8Tensor": torchao(Float8WeightOnlyConfig()),
    "torchao, Opaque": _opaque,
    "hqq, HQQLinear": _hqq,
    "gptqmodel, Packed": Packed,
}
EXACT = [name for name in SCHEMES if "dynamic" not in name]


def tolerance(scheme: str) -> float:
    """Of outputs: inputs may be rounded to 8 bits, and without VNNI instructions, sums of int8 overflow in oneDNN."""
    return 1e-5 if scheme in EXACT else max(3e-2, 3 * _int8_error())


def _int8_error() -> float:
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, 128), torch.randn(16, WIDTH)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        return relative_error(layer(x), x @ layer.weight.dequantize().mT + layer.bias)


def quantized(scheme: str) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Linear(WIDTH, 128), nn.Linear(128, 32)
    return nn.Sequential(SCHEMES[scheme](first), nn.Tanh(), SCHEMES[scheme](last))


def config(*targets: str, **fields: object) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 4, "target_modules": list(targets or ("0", "2"))} | fields))


def adapted(scheme: str, **fields: object) -> nn.Sequential:
    """A quantized model with an adapter with random vectors."""
    model = hra_fx.transform(quantized(scheme), config(**fields))
    randomise(model)
    return model


def values(layer: Any) -> Tensor:
    """The dequantized weight of a layer in float64, by the functions of the libraries, without hra_fx."""
    if isinstance(layer, HQQLinear):
        return layer.dequantize().double()
    if isinstance(layer, Packed):
        return layer.codes.double() * layer.scales.double()
    weight = layer._parameters["weight"]
    if isinstance(weight, Opaque):
        return weight.packed.double()
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scale).double()
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    return weight.dequantize().detach().double()


def rotated(layer: Any, *names: str) -> Tensor:
    """`W Q_a Q_b ...` by dense products in float64; differentiable in the vectors."""
    return values(layer) @ layer_q(layer, names or ("default",))


def dense(model: nn.Sequential, x: Tensor, *names: str) -> Tensor:
    """The output of the adapted model, by dense products."""
    first, _, last = model
    hidden = torch.tanh(x.double() @ rotated(first, *names).mT + first.bias.double())
    return hidden @ rotated(last, *names).mT + last.bias.double()


def inputs() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(7))
