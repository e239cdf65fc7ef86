"""Private names of PyTorch, in one place.

Each has a public replacement or a fallback for releases that lack it. Where a fallback cannot know the answer, it
gives the safe one: the slower path, a cache miss or a copy. `make test-versions` tests the lowest and newest releases.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

T = TypeVar("T", bound=Tensor)

#: The child of the wrapper that `torch.distributed.algorithms._checkpoint.checkpoint_wrapper` puts around a module.
_CHECKPOINTED = "_checkpoint_wrapped_module"

_new_version = itertools.count(-2, -1)


def _lookup(*paths: str) -> Any:
    """The first of some dotted names that this release has."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(owner), name)
    raise ImportError(f"torch {torch.__version__} has none of {', '.join(paths)}, which hra_fx needs.")


def _no() -> bool:
    return False


def _yes() -> bool:
    return True


# --- what is active around a call; bound once, since every forward asks -----------------------------------------------

#: Whether a call is recorded by `torch.jit.trace`. TorchScript is deprecated since 2.9: without it, nothing is.
is_torchscript_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", _no)

#: Whether a functorch transform (`torch.func.grad`, `vmap`) is active. No public name exists.
is_functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _yes)

#: Truthy while a `TorchDispatchMode`, such as a FakeTensorMode, is active. No public name exists.
is_dispatch_mode_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _yes)

#: Whether autocast is enabled for any device. The public functions ask for one device.
is_autocast_active: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _yes)


def is_forward_ad_active() -> bool:
    """Whether a `torch.autograd.forward_ad.dual_level` is open. No public name exists."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_fx_tracing() -> bool:
    """Whether `torch.fx` traces symbolically. The name is from 2.9, and has no public replacement."""
    tracing = getattr(getattr(torch.fx, "_symbolic_trace", None), "is_fx_symbolic_tracing", None)
    # A tracer replaces the call of modules for as long as it runs.
    return nn.Module.__call__ is not _MODULE_CALL if tracing is None else bool(tracing())


_MODULE_CALL = nn.Module.__call__


def is_exporting() -> bool:
    """Whether `torch.export` runs. Inside `torch.compile`, the public function of torch 2.10 also returns True."""
    exporting: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if exporting is None else exporting


def export_forward_backward() -> Callable[..., Any]:
    """torch's function that adds the backward pass to an exported program; experimental, without a public name."""
    found: Callable[..., Any] = _lookup("torch.export.experimental._export_forward_backward")
    return found


def has_saved_tensors_hooks() -> bool:
    """Whether saved-tensor hooks are active, as in activation checkpointing. It has no public name."""
    top = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


# --- modules ----------------------------------------------------------------------------------------------------------


def _has_global_hooks() -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(nn_module, f"_global{name}", True) for name in names)


#: Whether hooks are registered for all modules. The name is from 2.8; without it, look at each dictionary.
has_global_module_hooks: Callable[[], bool] = getattr(nn_module, "_has_any_global_hook", _has_global_hooks)


def with_own_hooks(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of some modules on which hooks are registered. No public name exists; without the private ones: all."""
    every = set(modules)
    try:
        return {
            m for m in every if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        }
    except AttributeError:
        return every


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on a module."""
    return bool(with_own_hooks([module]))


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether the backward pass of a module runs hooks, its own or those of all modules."""
    names = ("_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, True) or getattr(nn_module, f"_global{name}", True) for name in names)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs hooks, its own or those of all modules."""
    return has_own_hooks(module) or has_global_module_hooks()


#: The attribute of a module that has the names of such buffers.
NON_PERSISTENT = "_non_persistent_buffers_set"


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The buffers that a module keeps out of its `state_dict`. Without torch's set, compare with a `state_dict`."""
    names: set[str] | None = getattr(module, NON_PERSISTENT, None)
    return set(module._buffers) - set(module.state_dict()) if names is None else names


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made a module for one forward. Without the mark, nothing is a replica."""
    return bool(getattr(module, "_is_replica", False))


def conv_border(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """The padding of a convolution as `F.pad` takes it: (before, after) from the last dimension to the first.

    torch keeps it as `_reversed_padding_repeated_twice`; this computes it from public attributes.

    Example:
        >>> conv_border(nn.Conv2d(1, 1, (2, 3), padding=(1, 2)))
        [2, 2, 1, 1]
        >>> conv_border(nn.Conv2d(1, 1, (2, 3), padding="same"))
        [1, 1, 0, 1]
    """
    if conv.padding == "valid":
        sides = [(0, 0) for _ in conv.kernel_size]
    elif conv.padding == "same":
        totals = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(int(size), int(size)) for size in conv.padding]
    return [size for before_and_after in reversed(sides) for size in before_and_after]


def is_called_by_distribute_module() -> bool:
    """Whether `torch.distributed.tensor.distribute_module` runs the caller of the function that calls this.

    It reads and writes `_distribute_module_applied` of a module. A reader other than it must change nothing.
    """
    distribute: Any = getattr(sys.modules.get("torch.distributed.tensor"), "distribute_module", None)
    return distribute is not None and sys._getframe(2).f_code is distribute.__code__


def is_split_by_old_transformers(module: nn.Module) -> bool:
    """Whether transformers below 5.16 applied its `tp_plan` to a layer, which may have split its weight.

    Such a weight is a plain tensor with the part of this process. Later versions make it a `DTensor`.
    """
    return getattr(module, "_hf_tp_plan", None) is not None


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `torch.compile(model)` made this module, which keeps the model as `_orig_mod`.

    TorchDynamo loads slowly, so this names its class (`torch._dynamo.eval_frame.OptimizedModule`) without an import.
    """
    dynamo = any(kind.__module__.startswith("torch._dynamo") for kind in type(module).__mro__)
    return dynamo and "_orig_mod" in module._modules


def state_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, with the paths that `state_dict` has.

    They lack the names that torch's activation checkpointing (`checkpoint_wrapper`, FSDP's `activation_checkpointing`)
    puts between a block and its parts. A module in such a wrapper is found at the path of the wrapper;
    `get_submodule` finds its parts too.
    """
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _CHECKPOINTED not in module._modules:
            yield f".{path}".replace(f".{_CHECKPOINTED}", "")[1:], module


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensor_version(tensor: Tensor) -> int:
    """A number that changes when a tensor is written in place; without one, a new number each time.

    A tensor made in inference mode has none, and gives -1: compare its values.
    """
    return tensor_versions([tensor])[0]


def tensor_versions(tensors: Iterable[Tensor]) -> list[int]:
    """The `tensor_version` of each tensor."""
    found = [-1 if tensor.is_inference() else getattr(tensor, "_version", None) for tensor in tensors]
    return [next(_new_version) if version is None else version for version in found]


def wrapper_tensor(kind: type[T], like: Tensor) -> T:
    """A tensor of a subclass without data, with shape, strides, dtype and device of another tensor.

    The class overrides `__torch_dispatch__`. torch documents this constructor for wrapper subclasses, and has no other.
    """
    make: Any = Tensor._make_wrapper_subclass
    made: T = make(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, layout=like.layout)
    return made


def _without_overrides(function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **(kwargs or {}))


#: `__torch_function__` of a tensor subclass that overrides nothing. torch's documentation uses the private name.
disabled_torch_function: Any = getattr(torch._C, "_disabled_torch_function_impl", staticmethod(_without_overrides))

#: Functions over nested containers, as torch itself flattens them. The public name is planned.
pytree: ModuleType = _lookup("torch.utils._pytree", "torch.utils.pytree")


def is_wrapper_subclass(tensor: Any) -> bool:
    """Whether a tensor wraps others, as `torch.utils._python_dispatch.is_traceable_wrapper_subclass` decides it."""
    return hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__")


def fake_tensor_mode() -> Any:
    """A mode in which tensors have shapes and no values; real ones are converted."""
    kind = _lookup("torch._subclasses.fake_tensor.FakeTensorMode", "torch._subclasses.FakeTensorMode")
    return kind(allow_non_fake_inputs=True)


# --- operators --------------------------------------------------------------------------------------------------------

#: The class of one overload of an operator, such as `torch.ops.aten.add.Tensor`. It has no public name.
OpOverload: type[Any] = type(torch.ops.aten.add.Tensor)


_HIGHER_ORDER: type[Any] | None = getattr(torch._ops, "HigherOrderOperator", None)


def call_after_deepcopy(graph: Any, hook: Callable[[Any], None]) -> None:
    """Call a function with each deepcopy of a `GraphModule`. Without the private method, it is not called."""
    register = getattr(graph, "_register_deepcopy_hook", None)
    if register is not None:
        register(hook)


#: The operator that checks the dtype and device of a tensor before a cast.
ASSERT_METADATA: Any = torch.ops.aten._assert_tensor_metadata.default


def is_higher_order(target: object) -> bool:
    """Whether a node's target takes graphs, as `torch.cond` does. Without the class, its module decides."""
    if _HIGHER_ORDER is None:
        return type(target).__module__.startswith("torch._higher_order_ops")
    return isinstance(target, _HIGHER_ORDER)


def schema_of(target: object) -> Any:
    """The schema of an operator, with `name`, `arguments` and `is_mutable`; `None` for other functions."""
    return getattr(target, "_schema", None)


def renew_step_of_accelerate(wrapper: Any) -> None:
    """Let accelerate's wrapper of an optimizer call the present `step`, in place of the one that it took."""
    if hasattr(wrapper, "_optimizer_original_step_method"):
        from accelerate.optimizer import patch_optimizer_step  # type: ignore[import-untyped]

        wrapper._optimizer_original_step_method = wrapper.optimizer.step
        wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, wrapper.optimizer.step)


def copy_all(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy tensors of one device into others, in one operator for all. torch's optimizers use the private name."""
    torch._foreach_copy_(targets, values)


# --- torch.export -----------------------------------------------------------------------------------------------------


def guards_of(program: Any) -> list[str]:
    """The conditions that `torch.export` found for the inputs, as Python expressions over `L`, the arguments."""
    return list(getattr(program, "_guards_code", ()))


def guard_function(code: str) -> Callable[..., None]:
    """The function `check` of some source, whose expressions may be those of `guards_of`.

    TorchDynamo traces it, so that a compiled or exported graph keeps the conditions.
    """
    functions = _lookup("torch.fx.experimental.symbolic_shapes.SYMPY_INTERP")
    namespace: dict[str, Any] = {**functions, "math": math, "inf": math.inf, "torch": torch}
    exec(code, namespace)
    check: Callable[..., None] = namespace["check"]
    return check
