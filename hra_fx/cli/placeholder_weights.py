"""Placeholder tensors with a shape and a dtype, but the memory of a single value.

Tensors on the meta device are refused by `transform`, because their values would be missing. Here nothing is computed,
so one value expanded to the shape is enough.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def use_placeholders(model: nn.Module) -> nn.Module:
    """Replace all parameters and buffers by placeholders; shared tensors stay shared.

    Parameters are NaN, so that anything computed from weights is visibly unknown.

    Example:
        >>> use_placeholders(nn.Linear(4096, 4096, device="meta")).weight.untyped_storage().nbytes()
        4
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(_expanded(parameter), parameter.requires_grad))
                module._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _expanded(buffer))
    return model


def _expanded(tensor: Tensor) -> Tensor:
    value = math.nan if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
