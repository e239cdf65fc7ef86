"""Private names of torch that the package uses, each with a fallback."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint


def has_saved_tensors_hooks() -> bool:
    """Whether saved-tensor hooks are active: activation checkpointing, offloading of activations."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


#: `__torch_function__` of a tensor subclass that overrides none.
disabled_torch_function = torch._C._disabled_torch_function_impl

#: The function below the decorators of `torch.utils.checkpoint.checkpoint`, and the attribute of it that is called in
#: its place if it is set, under whatever name `checkpoint` was imported.
checkpoint: Any = getattr(torch.utils.checkpoint.checkpoint, "__wrapped__", torch.utils.checkpoint.checkpoint)
CHECKPOINT_CALLS = "__dynamo_disable"
