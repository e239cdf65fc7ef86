"""Parameters trained by DeepSpeed's ZeRO. Stage 3 replaces them with empty tensors between calls of their layer."""

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


def is_partitioned_by_zero3(tensor: Tensor) -> bool:
    """Whether DeepSpeed partitions a parameter between the calls of its layer, although it may be complete now.

    With one process, or after a prefetch, it is complete early. The backward pass of its layer partitions it again, and
    a gradient that arrives later does not fit.

    Example:
        >>> is_partitioned_by_zero3(nn.Linear(6, 4).weight)
        False
    """
    return not getattr(tensor, "ds_persist", True)


def is_trained_by_zero(vectors: Tensor) -> bool:
    """Whether `deepspeed.initialize` has prepared the vectors of an adapter: stages 1 and 2, or stage 3.

    Example:
        >>> is_trained_by_zero(nn.Linear(6, 4).weight)
        False
    """
    return hasattr(vectors, "_hp_mapping") or hasattr(vectors, "ds_id")
