"""Private names of torch that the package uses, each with a fallback."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import _symbolic_trace

T = TypeVar("T", bound=Tensor)


def has_saved_tensors_hooks() -> bool:
    """Whether saved-tensor hooks are active: activation checkpointing, offloading of activations."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def is_fx_tracing() -> bool:
    """Whether torch.fx traces symbolically; the function of that name in torch logs a warning."""
    return bool(getattr(_symbolic_trace, "_is_fx_tracing_flag", False))


#: `__torch_function__` of a tensor subclass that overrides none.
disabled_torch_function = torch._C._disabled_torch_function_impl


def wrapper_tensor(kind: type[T], like: Tensor) -> T:
    """A tensor of a subclass without data, with shape, strides, dtype and device of another tensor.

    The class overrides `__torch_dispatch__`; torch documents this constructor for wrapper subclasses.
    """
    make: Any = Tensor._make_wrapper_subclass
    made: T = make(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, layout=like.layout)
    return made
