"""Products with the weights of a base model in bfloat16: several times as fast on CPUs that have instructions for it.

Everything else stays in float32: adapters, their products, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 numbers. Without AVX-512, this takes several times as long as float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


class BaseProducts(TorchFunctionMode):
    """Inside of it, `F.linear` computes in bfloat16 with the weights that a model has now.

    Args:
        model: a model in float32, after an adapter was inserted. Weights that are trained are rounded in each product.
        paths: its Linears before that.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        layers: list[Any] = [model.get_submodule(path) for path in paths]
        weights = [getattr(layer, "base_layer", layer).weight for layer in layers]
        self.weights = weights  # kept, so that no other tensor gets their addresses
        self.rounded = {weight.data_ptr(): weight.detach().bfloat16() for weight in weights}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace `F.linear(x, weight, bias)`."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            rounded = self.rounded.get(weight.data_ptr()) if weight.dim() == 2 else None
            if rounded is not None:
                product = _Product.apply(x, weight, weight.bfloat16() if weight.requires_grad else rounded)
                return product if bias is None else product + bias
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """`x W^T` with float32 in and out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
        low = x.bfloat16()
        ctx.save_for_backward(low if weight.requires_grad else None, rounded)
        return F.linear(low, rounded).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, rounded = ctx.saved_tensors
        low = grad.bfloat16()
        to_weight = None if x is None else (low.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return (low @ rounded).float() if ctx.needs_input_grad[0] else None, to_weight, None
