"""Parameters that DeepSpeed's ZeRO-3 partitions: an empty tensor is in their place between the calls of their layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter while its layer runs.

    Example:
        >>> full_shape(nn.Linear(6, 4).weight)
        torch.Size([4, 6])
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def is_partitioned(module: nn.Module) -> bool:
    """Whether this process holds only a part of a parameter of a module.

    Example:
        >>> is_partitioned(nn.Linear(6, 4))
        False
    """
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    return any(full_shape(parameter) != parameter.shape for parameter in held)
