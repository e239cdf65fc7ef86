"""Fill tensors that `to_empty` allocates with NaN, so that no adapter trains from uninitialized memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def nan_for_new_memory(module: nn.Module) -> Iterator[None]:
    """Context manager for `nn.Module._apply`: fills floating-point tensors that get new memory with NaN.

    Example:
        >>> layer = nn.Linear(2, 1, device="meta")
        >>> with nan_for_new_memory(layer):
        ...     layer = layer.to_empty(device="cpu")
        >>> layer.bias.detach()
        tensor([nan])
    """
    before = {name for name, tensor in _tensors(module) if tensor.is_meta}
    yield
    for name, tensor in _tensors(module):
        if name in before and not tensor.is_meta and tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
