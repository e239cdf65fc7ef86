"""Where plain PyTorch computes with plain tensors, so that a node of our own stands for a formula; in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def applies(x: Tensor, *made_of: Tensor) -> bool:
    """Whether `x` can be computed with by nodes of ours: plain tensors on one device, and nobody who looks on.

    Args:
        x: the input.
        made_of: what the result is made of besides.
    """
    if type(x) not in _PLAIN or torch.compiler.is_compiling():
        return False
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # and autograd still keeps nothing
        return False
    device = x.device
    for part in made_of:
        if type(part) not in _PLAIN or part.device != device:
            return False
    return (
        device.type in ("cpu", "cuda")
        and x.is_floating_point()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


def may_keep(x: Tensor) -> bool:
    """Whether factors may be kept for this input (`hra_fx.kept`): no gradient is asked for, and nobody records."""
    if type(x) not in _PLAIN or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu"


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with `x` run here and now: its own, or that of autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
