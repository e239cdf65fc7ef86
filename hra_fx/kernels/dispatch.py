"""Decide when an adapted layer uses the factors of its adapters instead of the plain formulas, and in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hra_fx import compat

#: The classes of ordinary tensors.
PLAIN = (Tensor, nn.Parameter)


def is_compiling() -> bool:
    """True while TorchDynamo traces for a compiler, but not for an export."""
    return torch.compiler.is_dynamo_compiling() and not compat.is_exporting()


def is_plain_eager() -> bool:
    """True in plain eager mode: no compiler, tracer, dispatch mode, functorch transform or forward-mode AD."""
    if torch.compiler.is_compiling() or compat.is_torchscript_tracing() or compat.is_dispatch_mode_active():
        return False
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # then autograd does not save anything
        return False
    return not compat.is_functorch_active() and not compat.is_forward_ad_active()


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary floating-point tensors, without subclasses."""
    return all(type(tensor) in PLAIN and tensor.is_floating_point() for tensor in tensors)


def products_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrix products of tensors with `dtype`: the dtype of autocast, if it is enabled."""
    if dtype is not torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
