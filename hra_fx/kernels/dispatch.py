"""When the kernels can be used instead of the plain formulas, and in which dtype they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hra_fx import compat

_PLAIN = (Tensor, nn.Parameter)


def can_use_autograd_function(x: Tensor, *others: Tensor) -> bool:
    """Whether a custom autograd function can compute with these tensors.

    Args:
        x: the input.
        others: the other tensors that the result depends on.
    """
    return is_plain_eager() and are_plain_tensors(x, *others)


def is_plain_eager() -> bool:
    """True in plain eager mode: no compiler, tracer, dispatch mode, functorch transform or forward-mode AD."""
    if torch.compiler.is_compiling() or compat.is_torchscript_tracing() or compat.is_dispatch_mode_active():
        return False
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # autograd saves nothing then
        return False
    return not compat.is_functorch_active() and not compat.is_forward_ad_active()


def are_plain_tensors(x: Tensor, *others: Tensor) -> bool:
    """Whether these are ordinary tensors (no subclass) on one device, CPU or CUDA, and `x` is floating point."""
    if type(x) not in _PLAIN or not x.is_floating_point():
        return False
    if x.is_cpu:  # faster than comparing devices
        return all(type(one) in _PLAIN and one.is_cpu for one in others)
    return x.is_cuda and all(type(one) in _PLAIN and one.device == x.device for one in others)


def can_cache(x: Tensor, *sources: Tensor) -> bool:
    """Whether a value computed from `sources` can be cached (`hra_fx.kernels.cache`): on the CPU, without gradients.

    Args:
        x: the input.
        sources: the tensors that the value depends on.
    """
    if not can_use_autograd_function(x, *sources) or x.device.type != "cpu":
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *sources))


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`: its own, or that of autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
