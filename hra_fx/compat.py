"""Private names of PyTorch and differences between releases of libraries, in one place.

`make test-versions` tests them with the lowest and newest releases.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn.modules import module as nn_module
from torch.utils import _pytree

from hra_fx.errors import AdapterError

# --- releases ---------------------------------------------------------------------------------------------------------

#: What needs a newer release than pyproject.toml asks for: feature -> (library, lowest release).
NEWER: Mapping[str, tuple[str, str]] = {
    "a graph captured by torch.export": ("torch", "2.9"),
    "export_training_step": ("torch", "2.9"),
    "`target_parameters` for the experts of a transformers model": ("transformers", "5.6"),
}


def require(feature: str) -> None:
    """Raise `AdapterError` if the installed release of a library is too old for a feature in `NEWER`."""
    library, release = NEWER[feature]
    installed = version(library)
    first, wanted = ([int(number) for number in re.findall(r"\d+", text)[:2]] for text in (installed, release))
    if first < wanted:
        raise AdapterError(
            f"{feature} needs {library} {release} or later, and {installed} is installed. Run: "
            f"pip install '{library}>={release}'."
        )


# --- what is active during a call; looked up once here, because every forward uses it ---------------------------------

#: Whether a call is recorded by `torch.jit.trace`. The public function is deprecated.
is_torchscript_tracing: Callable[[], bool] = torch._C._is_tracing

#: Whether a functorch transform (`torch.func.grad`, `vmap`) is active.
is_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

#: Truthy while a `TorchDispatchMode`, such as a FakeTensorMode, is active.
is_dispatch_mode_active: Callable[[], int] = torch._C._len_torch_dispatch_stack

#: Whether autocast is enabled for any device. The public functions ask for one device.
is_autocast_active: Callable[[], bool] = torch._C._is_any_autocast_enabled


#: Whether `torch.fx` traces symbolically. torch 2.6 only has the function that is deprecated later.
is_fx_tracing: Callable[[], bool] = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)


def is_compiling() -> bool:
    """True while TorchDynamo traces for a compiler, but not for an export."""
    return torch.compiler.is_dynamo_compiling() and not is_exporting()


def is_plain_eager() -> bool:
    """True in plain eager mode: no compiler, tracer, dispatch mode, functorch transform or forward-mode AD."""
    if torch.compiler.is_compiling() or is_torchscript_tracing() or is_dispatch_mode_active():
        return False
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # then autograd does not save anything
        return False
    return not is_functorch_active() and forward_ad._current_level < 0


def records_operators() -> bool:
    """Whether functorch, forward-mode AD or a tracer needs plain operators instead of autograd functions."""
    recording = is_torchscript_tracing() or (torch.compiler.is_compiling() and is_exporting())
    return recording or is_functorch_active() or forward_ad._current_level >= 0


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def is_exporting() -> bool:
    """Whether `torch.export` runs. Inside `torch.compile`, the public function of torch 2.10 also returns True."""
    if not hasattr(torch.compiler, "_is_exporting_flag"):  # torch 2.6
        return torch.compiler._is_compiling_flag and not torch.compiler.is_dynamo_compiling()
    return torch.compiler._is_exporting_flag


def custom_functions(nodes: Iterable[Any]) -> set[type[Any]]:
    """The custom autograd functions of the nodes of a backward graph."""
    kind: Any = torch.autograd.function.BackwardCFunction
    return {node._forward_cls for node in nodes if isinstance(node, kind)}


def export_forward_backward() -> Callable[..., Any]:
    """torch's function that adds the backward pass to an exported program; experimental, and slow to import."""
    return importlib.import_module("torch.export.experimental")._export_forward_backward  # type: ignore[no-any-return]


# --- modules ----------------------------------------------------------------------------------------------------------


def loaded_class(module: str, name: str) -> Any:
    """A class for `isinstance` and `issubclass`; `()` if its module is not loaded, so that no object has the class.

    The module may also be half loaded, while another thread imports it.
    """
    return getattr(sys.modules.get(module), name, ())


#: The hooks that are registered on a module.
HOOKS = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on a module."""
    return any(HOOKS(module))


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether the backward pass of a module runs hooks, either its own or global ones."""
    own = module._backward_hooks or module._backward_pre_hooks
    return bool(own or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)


#: The attribute of a module that contains the names of its non-persistent buffers.
NON_PERSISTENT = "_non_persistent_buffers_set"


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of the buffers that a module does not save in its `state_dict`."""
    return module._non_persistent_buffers_set


#: The attribute that says whether `nn.DataParallel` created a module for one forward.
REPLICA = "_is_replica"


def is_split_by_transformers(module: nn.Module) -> bool:
    """Whether transformers below 5.16 may have split a weight into plain tensors. Later ones make it a `DTensor`."""
    return getattr(module, "_hf_tp_plan", None) is not None


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `torch.compile(model)` created this module. TorchDynamo loads slowly, so its class is not imported."""
    dynamo = any(cls.__module__.startswith("torch._dynamo") for cls in type(module).__mro__)
    return dynamo and "_orig_mod" in module._modules


#: Name of the child of torch's wrapper for activation checkpointing (`checkpoint_wrapper`).
_CHECKPOINTED = "_checkpoint_wrapped_module"


def state_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Like `model.named_modules()`, but with the paths that `state_dict` uses.

    They do not contain the names that torch's activation checkpointing inserts between a block and its parts.
    """
    return state_paths(model.named_modules(remove_duplicate=remove_duplicate))


def state_paths(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """The items of `named_modules`, with the paths of `state_modules`."""
    for path, module in modules:
        if _CHECKPOINTED not in module._modules:
            yield f".{path}".replace(f".{_CHECKPOINTED}", "")[1:], module


# --- tensors ----------------------------------------------------------------------------------------------------------


#: A number that changes when a tensor is written in place. A tensor of inference mode has none.
VERSION = operator.attrgetter("_version")


def tensor_versions(tensors: Sequence[Tensor]) -> list[int]:
    """Numbers that change when tensors are written in place; -1 for a tensor of inference mode, which has none."""
    try:
        return list(map(VERSION, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


#: Functions over nested containers, as torch itself flattens them.
pytree: Any = _pytree


_dataclasses: set[type[Any]] = set()


def know_dataclasses(value: Any) -> None:
    """Let `pytree` flatten the dataclasses in a value, until `forget_dataclasses`."""
    for leaf in _pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            kind = type(leaf)
            if kind not in _pytree.SUPPORTED_NODES:
                _pytree.register_pytree_node(kind, _fields, partial(_from_fields, kind))
                _dataclasses.add(kind)
            know_dataclasses(_fields(leaf)[0])


def _fields(value: Any) -> tuple[list[Any], list[str]]:
    names = [field.name for field in dataclasses.fields(value)]
    return [getattr(value, name) for name in names], names


def _from_fields(kind: type[Any], values: Iterable[Any], names: Sequence[str]) -> Any:
    return kind(**dict(zip(names, values, strict=True)))


def forget_dataclasses() -> None:
    """End `know_dataclasses`: classes of users are not registered for the whole process."""
    while _dataclasses:
        _pytree._deregister_pytree_node(_dataclasses.pop())


def children_of(spec: Any) -> list[Any]:
    """The parts of a `TreeSpec`. torch 2.9 has no method for them."""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def fake_tensor_mode() -> Any:
    """A mode in which tensors have shapes but no values; real tensors are converted."""
    return FakeTensorMode(allow_non_fake_inputs=True)


# --- transformers -----------------------------------------------------------------------------------------------------


def weight_conversions() -> Any:
    """transformers' module with its conversions of checkpoints, which imports slowly; `None` before transformers 5."""
    name = "transformers.conversion_mapping"
    return importlib.import_module(name) if find_spec(name) else None


def conversion_names() -> dict[str, str]:
    """Model type -> the name of its conversion of checkpoints in transformers."""
    return getattr(weight_conversions(), "_MODEL_TO_CONVERSION_PATTERN", {})


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Context manager in which experts of transformers compute one expert after the other."""
    name = "_experts_implementation"
    configs = {id(config): config for part in model.modules() if hasattr(config := getattr(part, "config", None), name)}
    before = [getattr(config, name) for config in configs.values()]
    try:
        for config in configs.values():
            setattr(config, name, "eager")
        yield
    finally:
        for config, own in zip(configs.values(), before, strict=True):
            setattr(config, name, own)


# --- operators --------------------------------------------------------------------------------------------------------

#: The key of `GraphModule.meta` for attributes that fx sets in each deepcopy.
KEPT_ATTRIBUTES = "_user_preserved_attributes"
#: The operator that checks the dtype and device of a tensor before a cast.
ASSERT_METADATA: Any = torch.ops.aten._assert_tensor_metadata.default


def is_higher_order(target: object) -> bool:
    """Whether a node's target takes graphs, as `torch.cond` does."""
    return isinstance(target, HigherOrderOperator)


def schema_of(target: object) -> Any:
    """The schema of an operator, with `name`, `arguments` and `is_mutable`; `None` for other functions."""
    return getattr(target, "_schema", None)


# --- torch.export -----------------------------------------------------------------------------------------------------


def guards_of(program: Any) -> list[str]:
    """The conditions that `torch.export` found for the inputs, as Python expressions of `L`, the arguments."""
    return list(program._guards_code)


def guard_function(code: str) -> Callable[..., None]:
    """Run source code and return the function `check` that it defines, which TorchDynamo can trace."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    namespace: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf, "torch": torch}
    exec(code, namespace)
    check: Callable[..., None] = namespace["check"]
    return check
