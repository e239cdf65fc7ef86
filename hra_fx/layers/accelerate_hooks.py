"""accelerate's hooks on the modules of a model, and how adapters handle them.

`dispatch_model` (a `device_map`), `cpu_offload` and `disk_offload` add a hook to each module with tensors. The hook
moves the inputs to the module's device. If it offloads, the tensors are in memory only during the module's own forward,
and otherwise on the meta device. accelerate is not imported: if it is not loaded, no module has a hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has a hook of accelerate."""
    return "_hf_hook" in module.__dict__


def has_class_forward(module: nn.Module) -> bool:
    """Whether the forward of a module, without accelerate's hook, is the method of its class."""
    name = "_old_forward" if is_hooked(module) else "forward"
    held = module.__dict__.get(name)
    bound = getattr(held, "__self__", None) is module and getattr(held, "__func__", None) is type(module).forward
    return held is None or bound


def calls_class_forward(module: nn.Module) -> bool:
    """Whether calling a module runs the method of its class. A hook of accelerate may only move the inputs."""
    hook = module.__dict__.get("_hf_hook")
    moves = hook is None or (type(hook).__name__ == "AlignDevicesHook" and not hook.offload)
    return moves and has_class_forward(module)


def offloading_hook(module: nn.Module) -> Any:
    """The hook that offloads the tensors of a module, or `None`."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return next((one for one in hooks if getattr(one, "offload", False) is True), None)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Context manager in which the offloaded tensors of a module are in memory, as in its forward. Can be nested."""
    if offloading_hook(module) is None or not any(tensor.is_meta for tensor in module.parameters(recurse=False)):
        yield
        return
    hook: Any = vars(module)["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def keep_loaded(module: nn.Module) -> None:
    """Load the offloaded tensors of a module to its execution device, and do not offload them again."""
    hook = offloading_hook(module)
    if hook is None:
        return
    hook.pre_forward(module)
    for name in ("_hf_hook", "_old_forward", "forward"):  # accelerate would move them to their previous device
        del vars(module)[name]
