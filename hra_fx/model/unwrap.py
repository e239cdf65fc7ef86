"""Seeing through what wraps a whole model and adds nothing of its own to it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from hra_fx.compat import is_compiled_module

M = TypeVar("M")


def unwrapped(model: M) -> M:
    """The model that `DistributedDataParallel`, `DataParallel` or `torch.compile` wraps; any other as it is.

    Example:
        >>> layer = nn.Linear(6, 4)
        >>> unwrapped(nn.DataParallel(layer)) is layer
        True
    """
    inner = model
    while isinstance(inner, nn.Module) and (name := _name_of_the_wrapped(inner)):
        inner = inner._modules[name]  # type: ignore[assignment]
    return inner


def _name_of_the_wrapped(model: nn.Module) -> str | None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    return "_orig_mod" if is_compiled_module(model) else None
