"""Remove wrappers that do not change the graph of a model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from hra_fx.compat import is_compiled_module

M = TypeVar("M")


def unwrap(model: M) -> M:
    """Return the model inside `DistributedDataParallel`, `DataParallel` or `torch.compile`, or else the model itself."""
    inner = model
    while isinstance(inner, nn.Module) and (name := _child_name(inner)):
        inner = inner._modules[name]  # type: ignore[assignment]
    return inner


def _child_name(model: nn.Module) -> str | None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    # If TorchDynamo is not loaded, no object has this class.
    return "_orig_mod" if is_compiled_module(model) else None
