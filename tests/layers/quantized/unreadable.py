"""Weights of torchao that a CPU can make, and that it cannot dequantize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
from torchao.utils import TorchAOBaseTensor


def int4() -> nn.Sequential:
    """As `Int4WeightOnlyConfig` makes it on a GPU; a CPU has no kernel, neither to make nor to call it."""
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    scale, zero = torch.ones(2, 32, dtype=torch.bfloat16), torch.zeros(2, 32, dtype=torch.bfloat16)
    packed = torch.zeros(32, 32, dtype=torch.int8)
    weight = Int4Tensor(packed, scale, zero, [1, 32], torch.Size([32, 64]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


class Opaque(TorchAOBaseTensor):
    """A weight that cannot say what it stands for: as those of GPU kernels, it can be multiplied with, and no more."""

    tensor_data_names = ("packed",)
    tensor_attribute_names = ()

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
    """A layer with such a weight, and what it stands for, `(32, 64)`."""
    layer = nn.Linear(64, 32)
    packed = torch.randint(-8, 8, (32, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    layer.weight = nn.Parameter(Opaque(packed), requires_grad=False)
    return nn.Sequential(layer), packed
