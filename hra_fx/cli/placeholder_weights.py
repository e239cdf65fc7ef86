"""Tensors that have a shape and a dtype, and the memory of one number.

A tensor on the meta device has none at all, and so is refused wherever weights are asked for: it would be adapted, and
never filled. Here nothing is ever computed, so that one number, seen in every place, will do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def hollow(model: nn.Module) -> nn.Module:
    """Put such tensors in the place of all parameters and buffers; those that are one tensor stay one.

    Parameters are NaN, so that what is computed from weights is seen to be unknown.

    Example:
        >>> hollow(nn.Linear(4096, 4096, device="meta")).weight.untyped_storage().nbytes()
        4
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(_seen_everywhere(parameter), parameter.requires_grad))
                module._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _seen_everywhere(buffer))
    return model


def _seen_everywhere(tensor: Tensor) -> Tensor:
    value = math.nan if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
