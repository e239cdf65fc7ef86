"""Where plain PyTorch computes with plain tensors, so that a node of our own stands for a formula; in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hra_fx import compat

_PLAIN = (Tensor, nn.Parameter)


def applies(x: Tensor, *made_of: Tensor) -> bool:
    """Whether `x` can be computed with by nodes of ours.

    Args:
        x: the input.
        made_of: what the result is made of besides.
    """
    return unobserved() and are_plain(x, *made_of)


def unobserved() -> bool:
    """Whether nobody looks on: no compiler, tracer, mode, transformation of functions or derivative in forward mode."""
    if torch.compiler.is_compiling() or compat.is_torchscript_tracing() or compat.is_dispatch_mode_active():
        return False
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # and autograd still keeps nothing
        return False
    return not compat.is_functorch_active() and not compat.is_forward_ad_active()


def are_plain(x: Tensor, *others: Tensor) -> bool:
    """Whether these are ordinary tensors on one device, the first of floating numbers."""
    if type(x) not in _PLAIN or not x.is_floating_point():
        return False
    if x.is_cpu:  # which is asked faster than a device
        return all(type(one) in _PLAIN and one.is_cpu for one in others)
    return x.is_cuda and all(type(one) in _PLAIN and one.device == x.device for one in others)


def may_keep(x: Tensor, *made_of: Tensor) -> bool:
    """Whether what is made of some tensors may be kept from call to call (`hra_fx.kernels.cache`): nobody wants a gradient.

    Args:
        x: the input.
        made_of: what is to be kept is made of these.
    """
    if not applies(x, *made_of) or x.device.type != "cpu":
        return False
    return not torch.is_grad_enabled() or not any(part.requires_grad for part in (x, *made_of))


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with `x` run here and now: its own, or that of autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
